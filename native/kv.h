// Keys and values of sessions: blocks of 64 positions, taken as they are needed. Sessions share blocks; one
// that writes to a block which somebody else holds copies it first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace bedplate {

struct KvShape {
    std::int64_t layers, heads, head_dim;
    bool half;
    bool of_long;  // whether the keys turn as those of a long text, see Rope

    std::size_t item_bytes() const { return half ? 2 : 4; }
    std::size_t head_bytes() const { return static_cast<std::size_t>(head_dim * kPositions) * item_bytes(); }
    std::size_t block_bytes() const { return static_cast<std::size_t>(layers * heads) * 2 * head_bytes(); }
    bool operator==(const KvShape& other) const {
        return layers == other.layers && heads == other.heads && head_dim == other.head_dim &&
               half == other.half && of_long == other.of_long;
    }
};

// The memory of all blocks that count with it.
struct Meter : std::enable_shared_from_this<Meter> {
    std::atomic<std::size_t> bytes{0};
};

// 64 positions, in all layers; zeros at first.
class KvBlock : public std::enable_shared_from_this<KvBlock> {
  public:
    KvBlock(const KvShape& shape, std::shared_ptr<Meter> meter);
    ~KvBlock() { meter_->bytes -= shape_.block_bytes(); }
    KvBlock(const KvBlock&) = delete;
    KvBlock& operator=(const KvBlock&) = delete;

    const KvShape& shape() const { return shape_; }
    std::uint8_t* data() const { return memory_.data(); }
    std::uint8_t* keys(std::int64_t layer, std::int64_t head) const {
        return data() + static_cast<std::size_t>(layer * shape_.heads + head) * 2 * shape_.head_bytes();
    }
    std::uint8_t* values(std::int64_t layer, std::int64_t head) const {
        return keys(layer, head) + shape_.head_bytes();
    }
    // Another one with the first positions of this, and zeros after.
    std::shared_ptr<KvBlock> copy(std::int64_t positions) const;

  private:
    KvShape shape_;
    std::shared_ptr<Meter> meter_;
    Region memory_;
};

// For one thread at a time, apart from `bytes`.
class Kv {
  public:
    Kv(const KvShape& shape, std::shared_ptr<Meter> meter) : shape_(shape), meter_(std::move(meter)) {}
    // What blocks hold already. InvalidError: they are of another shape, or hold not so many positions.
    Kv(const KvShape& shape, std::shared_ptr<Meter> meter, std::vector<std::shared_ptr<KvBlock>> blocks,
       std::int64_t positions);

    const KvShape& shape() const { return shape_; }
    const std::shared_ptr<Meter>& meter() const { return meter_; }
    std::int64_t positions() const { return positions_; }
    // Of its blocks, also of those that others hold.
    std::size_t bytes() const { return count_ * shape_.block_bytes(); }

    // How many bytes `reserve` takes.
    std::size_t growth(Range positions) const;
    // Makes room for positions to write. What is there stays as it is.
    void reserve(Range positions);
    // Positions before `end` are written.
    void hold(std::int64_t end) { positions_ = std::max(positions_, end); }
    // Another with the first positions of this, in the same blocks.
    std::shared_ptr<Kv> fork(std::int64_t positions) const;
    // A block as it is now, which never changes: one that is not full is copied.
    std::shared_ptr<KvBlock> block(std::int64_t index) const;

    void* keys(std::int64_t layer, std::int64_t head, std::int64_t block) {
        return blocks_[static_cast<std::size_t>(block)]->keys(layer, head);
    }
    void* values(std::int64_t layer, std::int64_t head, std::int64_t block) {
        return blocks_[static_cast<std::size_t>(block)]->values(layer, head);
    }

  private:
    bool is_alone(std::int64_t block) const;
    std::shared_ptr<KvBlock> block_copy(std::int64_t index) const;

    KvShape shape_;
    std::shared_ptr<Meter> meter_;
    std::vector<std::shared_ptr<KvBlock>> blocks_;
    std::atomic<std::size_t> count_{0};  // of blocks
    std::int64_t positions_ = 0;         // that are written
};

}  // namespace bedplate

// Keys and values of one session: blocks of 64 positions, taken as they are needed.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
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

class Kv {
  public:
    explicit Kv(const KvShape& shape) : shape_(shape) {}

    const KvShape& shape() const { return shape_; }
    std::size_t bytes() const { return taken_ * shape_.block_bytes(); }
    // Makes room for so many positions. What is there stays as it is.
    void reserve(std::int64_t positions) {
        const auto wanted = static_cast<std::size_t>((positions + kPositions - 1) / kPositions);
        while (blocks_.size() < wanted)
            blocks_.push_back(std::make_unique<const Region>(shape_.block_bytes(), false));
        taken_ = blocks_.size();
    }
    void* keys(std::int64_t layer, std::int64_t head, std::int64_t block) {
        return blocks_[static_cast<std::size_t>(block)]->data() +
               static_cast<std::size_t>(layer * shape_.heads + head) * 2 * shape_.head_bytes();
    }
    void* values(std::int64_t layer, std::int64_t head, std::int64_t block) {
        return static_cast<std::uint8_t*>(keys(layer, head, block)) + shape_.head_bytes();
    }

  private:
    KvShape shape_;
    std::vector<std::unique_ptr<const Region>> blocks_;
    std::atomic<std::size_t> taken_{0};
};

}  // namespace bedplate

#include "kv.h"

#include <algorithm>
#include <cstring>

namespace bedplate {
namespace {

std::int64_t blocks_for(std::int64_t positions) { return (positions + kPositions - 1) / kPositions; }

}  // namespace

KvBlock::KvBlock(const KvShape& shape, std::shared_ptr<Meter> meter)
    : shape_(shape), meter_(std::move(meter)), memory_(shape.block_bytes(), false) {
    meter_->bytes += shape_.block_bytes();
}

std::shared_ptr<KvBlock> KvBlock::copy(std::int64_t positions) const {
    auto made = std::make_shared<KvBlock>(shape_, meter_);
    // Keys stand in parts of 16 positions, [head_dim, 16] each; values in the order of positions.
    const std::size_t item = shape_.item_bytes(), row = kPart * item;
    const std::size_t whole = static_cast<std::size_t>(positions / kPart * shape_.head_dim) * row;
    const std::size_t rest = static_cast<std::size_t>(positions % kPart) * item;
    for (std::int64_t head = 0; head < shape_.layers * shape_.heads; ++head) {
        const std::uint8_t* from = keys(0, head);
        std::uint8_t* to = made->keys(0, head);
        std::memcpy(to, from, whole);
        for (std::size_t at = whole; rest > 0 && at < whole + shape_.head_dim * row; at += row)
            std::memcpy(to + at, from + at, rest);
        std::memcpy(made->values(0, head), values(0, head), positions * shape_.head_dim * item);
    }
    return made;
}

Kv::Kv(const KvShape& shape, std::shared_ptr<Meter> meter, std::vector<std::shared_ptr<KvBlock>> blocks,
       std::int64_t positions)
    : shape_(shape),
      meter_(std::move(meter)),
      blocks_(std::move(blocks)),
      count_(blocks_.size()),
      positions_(positions) {
    require(positions >= 0 && blocks_for(positions) == static_cast<std::int64_t>(blocks_.size()),
            "there are more positions than blocks hold, or fewer");
    for (const auto& block : blocks_)
        require(block->shape() == shape_, "a block of keys and values is of another model or form");
}

// Nobody else can come to hold a block that only this Kv holds: they get it from here.
bool Kv::is_alone(std::int64_t block) const {
    const bool alone = blocks_[static_cast<std::size_t>(block)].use_count() == 1;
    std::atomic_thread_fence(std::memory_order_acquire);  // whoever held it has read what it wanted
    return alone;
}

std::size_t Kv::growth(Range positions) const {
    const auto there = static_cast<std::int64_t>(blocks_.size());
    std::int64_t count = std::max<std::int64_t>(0, blocks_for(positions.end) - there);
    for (std::int64_t b = positions.begin / kPositions; b < std::min(there, blocks_for(positions.end)); ++b)
        count += !is_alone(b);
    return static_cast<std::size_t>(count) * shape_.block_bytes();
}

void Kv::reserve(Range positions) {
    while (static_cast<std::int64_t>(blocks_.size()) < blocks_for(positions.end)) {
        blocks_.push_back(std::make_shared<KvBlock>(shape_, meter_));
        count_ = blocks_.size();
    }
    for (std::int64_t b = positions.begin / kPositions; b < blocks_for(positions.end); ++b)
        if (!is_alone(b)) blocks_[static_cast<std::size_t>(b)] = block_copy(b);
}

std::shared_ptr<Kv> Kv::fork(std::int64_t positions) const {
    require(positions >= 0 && positions <= positions_, "there are not so many positions to share");
    const auto end = blocks_.begin() + blocks_for(positions);
    return std::make_shared<Kv>(shape_, meter_, std::vector<std::shared_ptr<KvBlock>>(blocks_.begin(), end),
                                positions);
}

std::shared_ptr<KvBlock> Kv::block(std::int64_t index) const {
    require(index >= 0 && index < blocks_for(positions_), "there is no such block");
    return positions_ < (index + 1) * kPositions ? block_copy(index)
                                                 : blocks_[static_cast<std::size_t>(index)];
}

// What is written of a block.
std::shared_ptr<KvBlock> Kv::block_copy(std::int64_t index) const {
    const std::int64_t written = positions_ - index * kPositions;
    return blocks_[static_cast<std::size_t>(index)]->copy(
        std::min<std::int64_t>(std::max<std::int64_t>(written, 0), kPositions));
}

}  // namespace bedplate

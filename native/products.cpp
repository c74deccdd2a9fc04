// Products of the linears of a place, and what corrections and adapters change of them.
#include <algorithm>

#include "decoder.h"

namespace bedplate {
namespace {

// Where some blocks of a linear's outputs stand in a row; none may be left.
Range columns_of(const Linears& linears, std::size_t linear, Range blocks) {
    const std::int64_t first = linears.firsts[linear], rows = linears.weights[linear]->rows();
    const std::int64_t end = std::min(blocks.end * kBlock, rows);
    return {first + std::min(blocks.begin * kBlock, end), first + end};
}

// A block of 8-bit weights takes as long as so many of 4 bits.
constexpr std::int64_t kNarrowCost = 2;

}  // namespace

// A thread's blocks of each linear of a place. `narrow`: blocks of narrow halves there, of which some threads
// read one more than others: those read less of the weights.
Decoder::Shares Decoder::shares(int thread, const Linears& linears, Place place, std::int64_t narrow) const {
    // Of gate and up a thread has the same blocks, and whole groups of what they come to.
    const bool pairs = place == kMlpIn;
    const std::int64_t blocks = pairs ? linears.weights[0]->blocks()
                                      : linears.firsts.back() / kBlock + linears.weights.back()->blocks();
    const std::int64_t unit = pairs ? kGroup / kBlock : 1, units = whole(blocks, unit), size = threads();
    const auto begin = [&](std::int64_t t) {
        const std::int64_t odd = narrow * t % size * kNarrowCost, cost = size * unit * (pairs ? 2 : 1);
        const std::int64_t more = std::min((odd + cost / 2) / cost, units / size / 2);
        return std::min((units * t / size + more) * unit, blocks);
    };
    const Range mine{begin(thread), begin(thread + 1)};
    Shares shares;
    for (std::size_t l = 0; l < linears.weights.size(); ++l) {
        const std::int64_t before = pairs ? 0 : linears.firsts[l] / kBlock;
        const Range some = overlap(mine, {before, before + linears.weights[l]->blocks()});
        shares[l] = {some.begin - before, std::max(some.begin, some.end) - before};
    }
    return shares;
}

Decoder::Work Decoder::at(std::int64_t layer, Place place) const {
    return {place, layer, &layer_of(layer).places[place], &all_, {0, rows()}};
}

// What is added to the products of a place, in this order, and what becomes of them then.
const Decoder::Changes& Decoder::changes_of(int thread, const Work& work) {
    Changes& changes = own_[static_cast<std::size_t>(thread)].changes;
    auto& [parts, finishes] = changes;
    parts.clear();
    finishes.clear();
    if (const auto& correction = work.linears->correction)
        parts.push_back({correction.get(), work.rows, corrected_.data(), 1, false});
    for (const Run& run : work.batch->runs) {
        const Range some = overlap(run.rows, work.rows);
        if (run.adapter == nullptr || some.begin >= some.end) continue;
        const Change& change =
            work.place == kHead
                ? run.adapter->head.change
                : run.adapter->layers[static_cast<std::size_t>(work.layer)].places[work.place];
        float* t = adapted_.data();
        for (const auto& [branch, factor] : change.terms) {
            parts.push_back({branch.get(), some, t, factor, true});
            t += ranks_of(*branch);
        }
        for (std::size_t l = 0; l < change.affines.size(); ++l)
            if (!change.affines[l].factor.empty()) finishes.push_back({&change.affines[l], l, some});
    }
    return changes;
}

// out = or += factor · (W x + b + B D x + B A x) + shift of linears, for this thread's blocks of each.
Decoder::Shares Decoder::apply(int thread, const Work& work, const Inputs& inputs, const Outputs& out) {
    const auto& [parts, finishes] = changes_of(thread, work);
    const Linears& linears = *work.linears;
    std::int64_t narrow_blocks = 0;
    for (const Part& part : parts) narrow_blocks += part.branch->narrow->blocks();
    const Shares blocks = shares(thread, linears, work.place, narrow_blocks);

    // Narrow values come first: each thread has those of the others long before it is through with its
    // weights.
    if (!parts.empty()) narrow(thread, work, narrow_blocks, inputs);
    const std::uint64_t arrivals = parts.empty() ? 0 : team_.arrive();
    for (const Finish& finish : finishes)
        if (out.add) set_aside(work, finish, blocks, out);
    for (std::size_t l = 0; l < linears.weights.size(); ++l)
        kernels_.product(linears.weights[l]->view(), inputs, work.rows, blocks[l], out.to + linears.firsts[l],
                         out.stride, out.add);
    if (!parts.empty()) team_.wait(arrivals);
    for (const Part& part : parts)
        for (const auto& back : part.branch->backs) {
            const auto l = static_cast<std::size_t>(back->linear());
            kernels_.back(back->view(), part.t + back->narrow(), ranks_, part.rows, blocks[l],
                          out.to + linears.firsts[l], out.stride);
        }
    for (const Finish& one : finishes) finish(work, one, blocks, out);
    return blocks;
}

// What outputs that change are to be added to stands aside until they are complete.
void Decoder::set_aside(const Work& work, const Finish& finish, const Shares& blocks, const Outputs& out) {
    const Range some = columns_of(*work.linears, finish.linear, blocks[finish.linear]);
    for (std::int64_t i = finish.rows.begin; i < finish.rows.end; ++i) {
        float* const x = out.to + i * out.stride;
        std::copy(x + some.begin, x + some.end, given_.data() + i * model_.stride + some.begin);
        std::fill(x + some.begin, x + some.end, 0.0f);
    }
}

void Decoder::finish(const Work& work, const Finish& finish, const Shares& blocks, const Outputs& out) {
    const Range some = columns_of(*work.linears, finish.linear, blocks[finish.linear]);
    const std::int64_t first = work.linears->firsts[finish.linear], row = some.begin - first;
    const auto& [factor, shift] = *finish.affine;
    for (std::int64_t i = finish.rows.begin; i < finish.rows.end && some.begin < some.end; ++i)
        kernels_.affine(factor.data() + row, shift.data() + row,
                        out.add ? given_.data() + i * model_.stride + some.begin : nullptr,
                        some.end - some.begin, out.to + i * out.stride + some.begin);
}

// This thread's share of t = A x of each part, [rows, ranks_]: some of the rows if they are many, else some
// of the blocks.
void Decoder::narrow(int thread, const Work& work, std::int64_t blocks, const Inputs& inputs) {
    std::int64_t before = 0;
    const Range mine_of_all = mine(thread, blocks);
    for (const Part& part : own_[static_cast<std::size_t>(thread)].changes.parts) {
        const Matrix& a = *part.branch->narrow;
        const std::int64_t count = part.rows.end - part.rows.begin;
        Range some = overlap({mine_of_all.begin - before, mine_of_all.end - before}, {0, a.blocks()});
        Range of_rows = part.rows;
        before += a.blocks();
        if (count >= threads() * kSide) {
            const Range sides = mine(thread, whole(count, kSide));
            some = {0, a.blocks()};
            of_rows = overlap(part.rows,
                              {part.rows.begin + sides.begin * kSide, part.rows.begin + sides.end * kSide});
        }
        if (some.begin >= some.end || of_rows.begin >= of_rows.end) continue;
        kernels_.product(a.view(), inputs, of_rows, some, part.t, ranks_, false);
        if (!part.scaled) continue;
        const std::int64_t end = std::min(some.end * kBlock, a.rows());
        for (std::int64_t i = of_rows.begin; i < of_rows.end; ++i)
            for (std::int64_t j = some.begin * kBlock; j < end; ++j)
                part.t[i * ranks_ + j] *= part.factor * work.batch->rows[static_cast<std::size_t>(i)].scale;
    }
}

}  // namespace bedplate

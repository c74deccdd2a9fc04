#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "instruction_sets.h"
#include "memory.h"

namespace bedplate {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2e = 1.4426950408889634;

// Philox 4x64-10 (Salmon et al. 2011): number `attempt` of draw `draw`, from 0 to 1, whatever was drawn
// before.
double uniform(std::uint64_t seed, std::uint64_t draw, std::uint64_t attempt) {
    std::uint64_t x[4] = {draw, attempt, 0, 0}, key[2] = {seed, 0};
    for (int round = 0; round < 10; ++round) {
        const auto a = static_cast<unsigned __int128>(x[0]) * 0xD2E7470EE14C6C93u;
        const auto b = static_cast<unsigned __int128>(x[2]) * 0xCA5A826395121157u;
        const std::uint64_t next[4] = {
            static_cast<std::uint64_t>(b >> 64) ^ x[1] ^ key[0], static_cast<std::uint64_t>(b),
            static_cast<std::uint64_t>(a >> 64) ^ x[3] ^ key[1], static_cast<std::uint64_t>(a)};
        std::copy(next, next + 4, x);
        key[0] += 0x9E3779B97F4A7C15u;
        key[1] += 0xBB67AE8584CAA73Bu;
    }
    return static_cast<double>(x[0] >> 11) * 0x1p-53;
}

// A beginning of the ranking: values above `least`, and those equal to it that stand before `end`.
struct Ranks {
    float least;
    std::int64_t end;

    bool hold(float value, std::int64_t at) const { return value > least || (value == least && at < end); }
};

// Logits, of which one is chosen.
class Pool {
  public:
    Pool(const Kernels& kernels, const float* values, std::int64_t count) : kernels_(kernels) {
        take(values, count);
    }
    Pool(const Pool&) = delete;

    float top() const { return all_.top; }
    std::int64_t count() const { return all_.count; }
    float value(std::int64_t at) const { return all_.values[at]; }
    Token token(std::int64_t at) const {
        return tokens_.empty() ? at : tokens_[static_cast<std::size_t>(at)];
    }
    Ranks all() const { return {-kInfinity, all_.count}; }
    Ranks before(std::int64_t at) const { return {value(at), at}; }

    // Where the highest is, the first of equal ones.
    std::int64_t highest() const {
        const auto block = std::find(maxima_.begin(), maxima_.end(), top()) - maxima_.begin();
        return std::find(all_.values + block * kMassBlock, all_.values + all_.count, top()) - all_.values;
    }

    // Where the `count` highest are, in the order of places.
    std::vector<std::int64_t> highest(std::int64_t count) const {
        // As many values as there are blocks are no lower than the blocks' maxima: few others are looked at.
        float least = -kInfinity;
        const auto last = static_cast<std::ptrdiff_t>(count) - 1;
        if (last < static_cast<std::ptrdiff_t>(maxima_.size())) {
            std::vector<float> ordered = maxima_;
            std::nth_element(ordered.begin(), ordered.begin() + last, ordered.end(), std::greater<>());
            least = ordered[static_cast<std::size_t>(last)];
        }
        std::vector<std::int64_t> found;
        for (std::int64_t at = 0; at < all_.count; ++at) {
            if (at % kMassBlock == 0 && maxima_[static_cast<std::size_t>(at / kMassBlock)] < least)
                at += kMassBlock - 1;
            else if (value(at) >= least)
                found.push_back(at);
        }
        if (count >= static_cast<std::int64_t>(found.size())) return found;
        std::vector<std::int64_t> ordered = found;
        std::nth_element(ordered.begin(), ordered.begin() + last, ordered.end(),
                         [&](std::int64_t a, std::int64_t b) { return before(b).hold(value(a), a); });
        const std::int64_t worst = ordered[static_cast<std::size_t>(last)];
        const Ranks kept{value(worst), worst + 1};
        found.erase(std::remove_if(found.begin(), found.end(),
                                   [&](std::int64_t at) { return !kept.hold(value(at), at); }),
                    found.end());
        return found;
    }

    // Only the highest from here on.
    void keep_highest(std::int64_t count) {
        tokens_ = highest(count);
        std::vector<float> kept;
        for (const std::int64_t at : tokens_) kept.push_back(value(at));
        kept_ = std::move(kept);
        take(kept_.data(), static_cast<std::int64_t>(kept_.size()));
    }

    void set_temperature(double temperature) {
        // Within bounds, 0 · scale is 0, and -infinity · scale is -infinity.
        const double most = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::min();
        all_.scale = static_cast<float>(std::clamp(kLog2e / temperature, least, most));
    }

    // What some of the values weigh together. draw() is among them from here on.
    double weigh(Ranks ranks) {
        ranks_ = ranks;
        const auto blocks = static_cast<std::int64_t>(maxima_.size());
        sums_.resize(maxima_.size());
        const std::int64_t middle = std::min(ranks.end / kMassBlock, blocks);
        kernels_.masses(all_, {0, middle}, ranks.least, sums_.data());
        if (middle < blocks) {
            double sum = 0;
            for (const float weight : weights(middle)) sum += static_cast<double>(weight);
            sums_[static_cast<std::size_t>(middle)] = static_cast<float>(sum);
            kernels_.masses(all_, {middle + 1, blocks}, std::nextafter(ranks.least, kInfinity), sums_.data());
        }
        double total = 0;
        for (const float sum : sums_) total += static_cast<double>(sum);
        return total;
    }

    double weight(std::int64_t at) const {
        std::array<float, kMassBlock> found;
        kernels_.weights(all_, at / kMassBlock, found.data());
        return static_cast<double>(found[static_cast<std::size_t>(at % kMassBlock)]);
    }

    // Where a part of the weight that weigh() gave ends, counted from the first value.
    std::int64_t draw(double target) const {
        std::int64_t last = 0;  // block with any weight: rounding may leave the target beyond it
        for (std::size_t b = 0; b < sums_.size(); ++b) {
            if (sums_[b] <= 0) continue;
            last = static_cast<std::int64_t>(b);
            if (target < static_cast<double>(sums_[b])) break;
            target -= static_cast<double>(sums_[b]);
        }
        std::int64_t found = last * kMassBlock, at = found;
        for (const float weight : weights(last)) {
            if (weight > 0) {
                found = at;
                if (target < static_cast<double>(weight)) break;
                target -= static_cast<double>(weight);
            }
            ++at;
        }
        return found;
    }

  private:
    using Weights = std::array<float, kMassBlock>;

    void take(const float* values, std::int64_t count) {
        maxima_.resize(static_cast<std::size_t>((count + kMassBlock - 1) / kMassBlock));
        const bool numbers = kernels_.maxima(values, count, maxima_.data());
        const float top = maxima_.empty() ? -kInfinity : *std::max_element(maxima_.begin(), maxima_.end());
        require(numbers && top < kInfinity, "the model's logits are not numbers");
        all_ = {values, count, maxima_.data(), top, all_.scale};
    }

    // Of a block's values, 0 for those that are not in the ranks.
    Weights weights(std::int64_t block) const {
        Weights found;
        kernels_.weights(all_, block, found.data());
        for (std::int64_t i = 0, at = block * kMassBlock; i < kMassBlock && at < all_.count; ++i, ++at)
            if (!ranks_.hold(value(at), at)) found[static_cast<std::size_t>(i)] = 0;
        return found;
    }

    const Kernels& kernels_;
    std::vector<Token> tokens_;  // of the values; empty: those of their places
    std::vector<float> kept_, maxima_, sums_;
    Candidates all_{};
    Ranks ranks_{};
};

// Which tokens a draw may give, of a pool that has the highest top_k.
struct Kept {
    Ranks least;               // by min-p
    double total = 0;          // what these weigh; the pool draws among them
    double before = HUGE_VAL;  // by top-p: what is ranked before a token weighs less

    Kept(Pool& pool, const SamplingRules& rules) : least(pool.all()) {
        if (rules.min_p > 0) {
            const double lowest = static_cast<double>(pool.top()) + std::log(rules.min_p) * rules.temperature;
            least.least = static_cast<float>(lowest);
            if (static_cast<double>(least.least) < lowest)
                least.least = std::nextafter(least.least, kInfinity);
        }
        if (rules.top_p < 1) {
            total = pool.weigh(pool.all());
            before = rules.top_p * total;
        }
        if (rules.top_p == 1 || rules.min_p > 0) total = pool.weigh(least);
    }
};

void prepare(Pool& pool, const SamplingRules& rules) {
    pool.set_temperature(rules.temperature);
    if (0 < rules.top_k && rules.top_k < pool.count()) pool.keep_highest(rules.top_k);
}

Token draw(Pool& pool, const SamplingRules& rules, std::uint64_t number) {
    prepare(pool, rules);
    const Kept kept(pool, rules);
    double total = kept.total;
    for (std::uint64_t attempt = 0;; ++attempt) {
        const std::int64_t at = pool.draw(total * uniform(rules.seed, number, attempt));
        if (rules.top_p == 1) return pool.token(at);
        total = pool.weigh(pool.before(at));  // 0 for the highest: this ends
        if (total < kept.before) return pool.token(at);
    }
}

void keep_allowed(Mask mask, std::vector<float>& values) {
    for (std::size_t begin = 0, word = 0; begin < values.size(); begin += 32, ++word) {
        const std::uint32_t bits = word < mask.count ? static_cast<std::uint32_t>(mask.words[word]) : 0;
        if (bits == 0xffffffffu) continue;
        const std::size_t end = std::min(begin + 32, values.size());
        for (std::size_t at = begin; at < end; ++at)
            if ((bits >> (at - begin) & 1) == 0) values[at] = -kInfinity;
    }
}

}  // namespace

Sampler::Sampler(SamplingRules rules, const std::vector<Token>& prompt)
    : rules_(std::move(rules)), kernels_(&current_kernels()) {
    if (rules_.repetition == 1) return;
    std::vector<Token> tokens = prompt;
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    for (const Token token : tokens) seen_.push_back({token, 0});
}

void Sampler::note(Token token) {
    ++generated_;
    if (rules_.repetition == 1 && rules_.presence == 0 && rules_.frequency == 0) return;
    auto at = std::lower_bound(seen_.begin(), seen_.end(), token,
                               [](const Seen& seen, Token wanted) { return seen.token < wanted; });
    if (at == seen_.end() || at->token != token) at = seen_.insert(at, {token, 0});
    ++at->generated;
}

const float* Sampler::changed(const float* row, std::int64_t count, Mask mask,
                              std::vector<float>& room) const {
    const bool ends_wait = generated_ < rules_.min_tokens && !rules_.ends.empty();
    if (mask.words == nullptr && rules_.bias.empty() && rules_.banned.empty() && seen_.empty() && !ends_wait)
        return row;
    room.assign(row, row + count);
    const auto change = [&](Token token, auto changed) {
        if (token < 0 || token >= count) return;
        float& value = room[static_cast<std::size_t>(token)];
        if (!std::isfinite(value)) return;
        const double most = std::numeric_limits<float>::max();
        value = static_cast<float>(std::clamp(changed(static_cast<double>(value)), -most, most));
    };
    const auto never = [&](Token token) {
        if (0 <= token && token < count) room[static_cast<std::size_t>(token)] = -kInfinity;
    };
    for (const auto& one : rules_.bias) change(one.first, [&](double value) { return value + one.second; });
    for (const Seen& seen : seen_)
        change(seen.token, [&](double value) {
            const double penalized = value > 0 ? value / rules_.repetition : value * rules_.repetition;
            if (seen.generated == 0) return penalized;
            return penalized - rules_.frequency * static_cast<double>(seen.generated) - rules_.presence;
        });
    std::for_each(rules_.banned.begin(), rules_.banned.end(), never);
    if (ends_wait) std::for_each(rules_.ends.begin(), rules_.ends.end(), never);
    if (mask.words != nullptr) keep_allowed(mask, room);
    return room.data();
}

std::optional<Token> Sampler::choose(const float* row, std::int64_t count, Mask mask) {
    static thread_local std::vector<float>
        room;  // pages that the system hands out anew take as long as a draw
    Pool pool(*kernels_, changed(row, count, mask, room), count);
    if (pool.top() == -kInfinity) return std::nullopt;
    const Token token =
        rules_.temperature == 0 ? pool.highest() : draw(pool, rules_, static_cast<std::uint64_t>(generated_));
    note(token);
    return token;
}

std::vector<double> Sampler::chances(const float* row, std::int64_t count, Mask mask) const {
    std::vector<float> room;
    Pool pool(*kernels_, changed(row, count, mask, room), count);
    std::vector<double> found(static_cast<std::size_t>(count));
    if (pool.top() == -kInfinity) return found;
    if (rules_.temperature == 0) {
        found[static_cast<std::size_t>(pool.highest())] = 1;
        return found;
    }
    prepare(pool, rules_);
    const Kept kept(pool, rules_);
    double total = 0;
    for (std::int64_t at = 0; at < pool.count(); ++at) {
        if (!kept.least.hold(pool.value(at), at) || pool.weigh(pool.before(at)) >= kept.before) continue;
        found[static_cast<std::size_t>(pool.token(at))] = pool.weight(at);
        total += pool.weight(at);
    }
    for (double& chance : found) chance /= total;
    return found;
}

LogProbabilities log_probabilities(const float* row, std::int64_t count, Token chosen, std::int64_t top) {
    Pool pool(current_kernels(), row, count);
    pool.set_temperature(1);
    const double all = static_cast<double>(pool.top()) + std::log(pool.weigh(pool.all()));
    const auto of = [&](std::int64_t at) { return static_cast<double>(pool.value(at)) - all; };
    LogProbabilities found{of(chosen), {}};
    if (top == 0) return found;
    auto places = pool.highest(std::min(top, count));
    std::sort(places.begin(), places.end(),
              [&](std::int64_t a, std::int64_t b) { return pool.before(b).hold(pool.value(a), a); });
    for (const std::int64_t at : places) found.top.emplace_back(at, of(at));
    return found;
}

}  // namespace bedplate

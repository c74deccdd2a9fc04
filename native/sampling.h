// The next token from a row of logits. docs/api.md says in which order settings take effect.
//
// Nothing is sorted: a token is drawn by the sums of blocks, and counts if what is ranked before it weighs
// less than top-p. If not, the next draw is among those before it. So a draw takes a few passes over the row.
//
// The same row, settings and number of the draw give the same token, on every instruction set.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"

namespace bedplate {

using Token = std::int64_t;

struct SamplingRules {
    double temperature;   // 0: the highest logit
    std::int64_t top_k;   // 0: all
    double top_p, min_p;  // 1 and 0: all
    double repetition;    // 1: none
    double presence, frequency;
    std::vector<std::pair<Token, double>> bias;
    std::vector<Token> banned;
    std::vector<Token> ends;  // banned before min_tokens
    std::int64_t min_tokens;
    std::uint64_t seed;
};

// Bits of tokens that are allowed, 32 in a word, the lowest first. Tokens beyond the last are not allowed.
struct Mask {
    const std::int32_t* words = nullptr;  // null: all are allowed
    std::size_t count = 0;
};

// Chooses the tokens of one generation.
class Sampler {
  public:
    // prompt: its tokens, for the repetition penalty.
    Sampler(SamplingRules rules, const std::vector<Token>& prompt);

    // The next token, which counts as generated then. Nothing: no token is allowed. InvalidError: logits are
    // not numbers; then nothing was generated.
    std::optional<Token> choose(const float* row, std::int64_t count, Mask mask);

    // The chance of each token in place of a choice. It takes a pass for each token: for tests.
    std::vector<double> chances(const float* row, std::int64_t count, Mask mask) const;

  private:
    struct Seen {
        Token token;
        std::int64_t generated;
    };

    // The row after what changes single tokens; it lies in `room` if anything does.
    const float* changed(const float* row, std::int64_t count, Mask mask, std::vector<float>& room) const;
    void note(Token token);

    SamplingRules rules_;
    const Kernels* kernels_;
    std::vector<Seen> seen_;  // by token
    std::int64_t generated_ = 0;
};

// Logarithms of probabilities, of the softmax of the row as it is.
struct LogProbabilities {
    double chosen;
    std::vector<std::pair<Token, double>> top;  // the likeliest first, of equal ones the lower token
};
LogProbabilities log_probabilities(const float* row, std::int64_t count, Token chosen, std::int64_t top);

}  // namespace bedplate

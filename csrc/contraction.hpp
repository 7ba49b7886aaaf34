// Scores of edges on a processor with wide vectors: pure C++, no Python, no torch. Arguments are validated by the
// caller.
#pragma once

#include <cstdint>
#include <vector>

namespace eaptk {

// [samples, tokens, rows, columns] of float32 or bfloat16. Strides count elements and are 0 along what is broadcast;
// the last one is 1.
struct Operand {
    const void* data;  // null: not there
    bool bfloat16;
    std::int64_t sample, token, row;
};

// [rows, head_dim, width] of float32; strides count elements, and one of the last two is 1.
struct Weight {
    const float* data;  // null: not there
    std::int64_t head_dim, row, dimension, column;
};

// One node, or all heads of a block, by what they wrote: `value`, or `value` less `replacement`, times `weight`.
struct Source {
    Operand value, replacement;
    Weight weight;  // of null data: value is [samples, tokens, 1, width]
    std::int64_t rows;
};

// Gradients of one or more rows, [samples, tokens, 1, width] or before the projection that is `weight`, and the sources
// they read: the first `reach`.
struct Gradient {
    Operand value;
    Weight weight;
    std::int64_t rows, reach;
};

// Destinations behind one norm, or one that is behind none.
struct Reader {
    std::vector<Gradient> gradients;
    Operand stream;           // what the norm reads, [samples, tokens, 1, width]; null: no norm
    const float *mean, *rho;  // [samples, tokens], mean null where none is removed
    std::int64_t n_tokens;    // of these two
    const float* gain;        // [padded(width)]
};

// Destinations that are contracted in one product.
using Group = std::vector<Reader>;

struct Scratch {
    float* sources;    // [runs, rows, pitch(width)]
    float* gradients;  // the same of the most rows of a group
    float* normed;     // and of the most readers
    std::int64_t runs;           // of tokens
};

constexpr int kTokens = 4;  // a run of tokens is added up in float32, runs in double
constexpr int kPadding = 16;

// A row's floats a token, and in all its tokens of a run.
inline std::int64_t padded(std::int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }
inline std::int64_t pitch(std::int64_t width) { return kTokens * padded(width) + kPadding; }

// Adds ⟨G_d, O_s⟩, over the tokens of each sample, into out: of each sample, of each group, [rows, reach of its last].
// Where a source has a replacement it is ⟨G_d, O'_s − O_s⟩. Samples are `first` and those after it, of `lengths`
// tokens; `lanes` is one of `lanes()`. A score's additions are in one order that depends on its own operands alone.
void contract(const std::vector<Source>& sources, const std::vector<Group>& groups, std::int64_t first,
              const std::vector<std::int64_t>& lengths, std::int64_t width, const Scratch& scratch, int threads, int lanes,
              double* out);

// Floats in a vector, of those that this processor has and `contract` was compiled for, the most first.
std::vector<int> lanes();

}  // namespace eaptk

// What the contraction does with vectors, compiled for each width of them that a processor may have.
#pragma once

#include <cstdint>
#include <vector>

#include "contraction.hpp"

namespace eaptk {

constexpr int kPanels = 128;  // columns of a head's weights that are brought together

inline std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Some tokens of one sample, and which run of the chunk they are.
struct Run {
    std::int64_t sample, token, n_tokens, index;
};

using Chunk = std::vector<Run>;

// Where a row's runs lie: in scratch, or in the operand itself where that needs no change.
struct Row {
    const float* data;
    std::int64_t sample, token, run;  // strides

    const float* at(const Run& of) const { return data + of.sample * sample + of.token * token + of.index * run; }
};

// A product of all destinations with some sources over all runs of a chunk.
struct Product {
    const std::vector<Row>& destinations;
    const std::vector<Row>& sources;
    const std::vector<std::int64_t>& reaches;  // of destinations, in ascending order
    const Chunk& runs;
    std::int64_t stride;  // between tokens of a row
    double* out;          // of the first sample, [destinations, stride_out]
    std::int64_t stride_out, stride_sample, first_sample;
};

struct Steps {
    // narrow [n, kTokens, head_dim] · a row of weight, `data`, into out, [kTokens, padded(width)] each `run` floats;
    // `panels` has room for head_dim · kPanels floats.
    void (*expand)(const float* narrow, std::int64_t n, const Weight& weight, const float* data, std::int64_t width,
                   float* panels, float* out, std::int64_t run);
    // Gradients of n tokens of a run, ρ times those at a norm's output, become those at the stream that it reads.
    void (*through_norm)(const float* normed, const float* gain, bool centred, std::int64_t n, std::int64_t width,
                         float* out);
    // Sources [first, last) with all destinations, over all runs of a chunk.
    void (*multiply)(const Product& of, std::int64_t first, std::int64_t last);
    int tile_sources;
};

// Of vectors of so many floats, one of `lanes()`.
const Steps& steps_of(int lanes);

}  // namespace eaptk

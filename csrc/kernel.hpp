// The inner loops over one block of a row that fits in the L1 cache.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EAPTK_CLONES __attribute__((target_clones("avx2", "default")))
#define EAPTK_AVX512 1
#else
#define EAPTK_CLONES
#define EAPTK_AVX512 0
#endif

namespace eaptk {

constexpr int kBlock = 1024;  // elements: 4 KB of scores beside 2 to 4 KB of indices in flight
constexpr int kStep = 32;     // a kernel takes a multiple of this many elements
constexpr int kLanes = 32;    // counters of bin 0 apart, one a lane: with heavy tails nearly all is there, and
                              // counting in one place would wait for each store to finish

// Sums over one block about a shift close to its mean; `n` elements.
struct BlockSums {
    double n, shift, sum_abs, s1, s2, s3, s4;
    float min, max;
};

// Where |w| is counted. A float32 product decides the bin wherever rounding cannot matter:
//
//     t = |w|·scale·(1 ± 2^-21) + (2^23 − 1/2)       (one fused multiply-add, rounded to an integer)
//
// holds the bin in its low bits (bin 0 as −1 below a quarter of a bin). If both signs agree, the bin is exact;
// the few elements where they differ lie next to an edge and are compared with the edges in double.
// Hence slots −1 … n: slots −1 and 0 are bin 0, slot b is bin b, slot n counts what lies above the last edge.
struct Binning {
    const double* edges;
    int n;
    float scale_low, scale_high, limit;

    int slots() const { return n + 2; }
    int slot(float w) const;
};

// Bins [n + 1 edges] of at most 2^16 bins, edges[n] a normal float32 away from both ends of the format.
Binning make_binning(const double* edges, int n);

// Counters of one thread. With `paired` one counter is kept for each pair of slots (first · slots() + second):
// half the stores, which are what a histogram costs. Indices of the block at hand are written to `indices`, and
// the previous block's are counted meanwhile, so that no load waits for a store still in flight.
struct Tally {
    const Binning* binning;
    bool paired;
    // Index 0 of either table is slot 0 (of slots 0 and 0); `lanes` is the first of kLanes counters of bin 0.
    std::uint16_t* pairs;
    std::uint32_t* singles;
    int lanes;
    std::int32_t* indices;  // [kBlock] or, paired, [kBlock / 2]
    const std::int32_t* previous;
};

using Kernel = BlockSums (*)(const float* x, int n, const Tally* tally);

// The kernel for this processor; `tally` may be null only for `counting == false`.
Kernel choose_kernel(bool counting, bool paired, bool portable);

// Count indices[begin, end) into the table.
void count(const Tally& tally, const std::int32_t* indices, int begin, int end);

}  // namespace eaptk

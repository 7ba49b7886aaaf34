#include "kernel.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if EAPTK_AVX512
// GCC 12 takes its own intrinsics' "undefined" operand for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

#include "sweep.hpp"

namespace eaptk {

Binning make_binning(const double* edges, int n) {
    const double scale = n / edges[n];
    return {edges, n, float(scale * (1 - 0x1p-21)), float(scale * (1 + 0x1p-21)), float((n + 0.5) / scale)};
}

int Binning::slot(float w) const {
    const double a = std::fabs(double(w));
    if (!(a <= edges[n])) return n;
    int bin = std::min(n - 1, int(a / edges[n] * n));
    if (a < edges[bin]) {
        --bin;
    } else if (bin + 1 < n && a >= edges[bin + 1]) {
        ++bin;
    }
    return bin;
}

void count(Tally& tally, const std::int32_t* indices, int n) {
    if (tally.paired) {
        for (int i = 0; i < n; ++i) ++tally.pairs[indices[i]];
    } else {
        for (int i = 0; i < n; ++i) ++tally.singles[indices[i]];
    }
}

namespace {

// Indices of kStep elements, decided in double: the way out when one of them lies next to an edge.
void exact_indices(const float* x, const Binning& binning, bool paired, std::int32_t* indices) {
    for (int j = 0; j < kStep / 2; ++j) {
        const int first = binning.slot(x[j]), second = binning.slot(x[j + kStep / 2]);
        indices[j] = paired ? first * binning.slots() + second : first;
        if (!paired) indices[j + kStep / 2] = second;
    }
}

// Lanes are spelled out so that the order of additions, hence the result, is the same for every compiler.
constexpr int kWidth = 8;

EAPTK_CLONES
BlockSums portable_sums(const float* x, int n, double shift) {
    float low[kWidth], high[kWidth];
    double a[kWidth] = {}, s1[kWidth] = {}, s2[kWidth] = {}, s3[kWidth] = {}, s4[kWidth] = {};
    for (int j = 0; j < kWidth; ++j) low[j] = high[j] = x[j];
    for (int i = 0; i < n; i += kWidth) {
        for (int j = 0; j < kWidth; ++j) {
            const float w = x[i + j];
            low[j] = w < low[j] ? w : low[j];
            high[j] = w > high[j] ? w : high[j];
        }
        for (int j = 0; j < kWidth; ++j) {
            const double w = x[i + j], d = w - shift, q = d * d;
            a[j] += std::fabs(w);
            s1[j] += d;
            s2[j] += q;
            s3[j] += q * d;
            s4[j] += q * q;
        }
    }
    BlockSums out{double(n), shift, 0, 0, 0, 0, 0, low[0], high[0]};
    for (int j = 0; j < kWidth; ++j) {
        out.sum_abs += a[j];
        out.s1 += s1[j];
        out.s2 += s2[j];
        out.s3 += s3[j];
        out.s4 += s4[j];
        out.min = std::min(out.min, low[j]);
        out.max = std::max(out.max, high[j]);
    }
    return out;
}

// Indices of one step into `out`.
EAPTK_CLONES
void portable_indices(const float* x, const Binning& binning, bool paired, std::int32_t* out) {
    const float low = binning.scale_low, high = binning.scale_high, limit = binning.limit;
    std::int32_t slots[kStep], near = 0;
    for (int j = 0; j < kStep; ++j) {
        const float size = std::fabs(x[j]), a = size < limit ? size : limit;
        slots[j] = std::int32_t(a * low);
        near |= slots[j] ^ std::int32_t(a * high);
    }
    if (near) {
        exact_indices(x, binning, paired, out);
    } else if (paired) {
        for (int j = 0; j < kStep / 2; ++j) out[j] = slots[j] * binning.slots() + slots[j + kStep / 2];
    } else {
        std::memcpy(out, slots, sizeof slots);
    }
}

BlockSums portable_counting(const float* x, int n, double shift, Tally* tally) {
    std::int32_t indices[kStep];
    for (int i = 0; i < n; i += kStep) {
        portable_indices(x + i, *tally->binning, tally->paired, indices);
        count(*tally, indices, tally->paired ? kStep / 2 : kStep);
    }
    return portable_sums(x, n, shift);
}

BlockSums portable_plain(const float* x, int n, double shift, Tally*) { return portable_sums(x, n, shift); }

#if EAPTK_AVX512

#define EAPTK_TARGET __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))

// Bound by the number of vector operations, about two a cycle: hence the tricks below to save some. Two
// accumulators a quantity hide the latency of an addition.
template <bool counting, bool paired, bool shifted>
EAPTK_TARGET BlockSums avx512_block(const float* x, int n, double shift, Tally* tally) {
    const __m512d centre = _mm512_set1_pd(shift);
    __m512 low0 = _mm512_loadu_ps(x), low1 = low0, high0 = low0, high1 = low0;
    __m512d a[2], s1[2], s2[2], s3[2], s4[2];
    for (int k = 0; k < 2; ++k) a[k] = s1[k] = s2[k] = s3[k] = s4[k] = _mm512_setzero_pd();

    std::uint16_t* const pairs = counting ? tally->pairs : nullptr;
    std::uint32_t* const singles = counting ? tally->singles : nullptr;
    std::int32_t* const ring = counting ? tally->ring : nullptr;
    int position = counting ? tally->position : 0;
    // Above 2^23 the spacing of floats is 1: added to it and rounded towards zero, a float leaves its integer
    // part in the low bits.
    const __m512 magic = _mm512_set1_ps(0x1p23f);
    const __m512i magic_bits = _mm512_castps_si512(magic);
    __m512 scale_low{}, scale_high{}, limit{};
    __m512i slots{}, lanes0{}, lanes1{};
    if constexpr (counting) {
        const Binning& binning = *tally->binning;
        scale_low = _mm512_set1_ps(binning.scale_low);
        scale_high = _mm512_set1_ps(binning.scale_high);
        limit = _mm512_set1_ps(binning.limit);
        slots = _mm512_set1_epi32(0x10000 | binning.slots());
        const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        lanes0 = _mm512_add_epi32(iota, _mm512_set1_epi32(tally->lanes));
        lanes1 = _mm512_add_epi32(lanes0, _mm512_set1_epi32(16));
    }

    for (int i = 0; i < n; i += kStep) {
        const float* p = x + i;
        __builtin_prefetch(p + kAhead);
        __builtin_prefetch(p + kAhead + 16);
        const __m512 x0 = _mm512_loadu_ps(p), x1 = _mm512_loadu_ps(p + 16);
        low0 = _mm512_min_ps(low0, x0);
        low1 = _mm512_min_ps(low1, x1);
        high0 = _mm512_max_ps(high0, x0);
        high1 = _mm512_max_ps(high1, x1);
        if constexpr (counting) {
            constexpr int kClearedSignMinimum = 0b1010, kTruncate = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
            // min(|w|, limit), which lies above the range, for a quiet NaN too.
            const __m512 u = _mm512_range_ps(x0, limit, kClearedSignMinimum);
            const __m512 v = _mm512_range_ps(x1, limit, kClearedSignMinimum);
            const __m512 ul = _mm512_fmadd_round_ps(u, scale_low, magic, kTruncate);
            const __m512 uh = _mm512_fmadd_round_ps(u, scale_high, magic, kTruncate);
            const __m512 vl = _mm512_fmadd_round_ps(v, scale_low, magic, kTruncate);
            const __m512 vh = _mm512_fmadd_round_ps(v, scale_high, magic, kTruncate);
            // Unordered counts as near, so that no bits of a signalling NaN become an index.
            const unsigned near =
                _mm512_cmp_ps_mask(ul, uh, _CMP_NEQ_UQ) | _mm512_cmp_ps_mask(vl, vh, _CMP_NEQ_UQ);

            std::int32_t* indices = ring + position;
            position = (position + (paired ? kStep / 2 : kStep)) % kRing;
            if constexpr (paired) {
#pragma GCC unroll 16
                for (int j = 0; j < kStep / 2; ++j) ++pairs[indices[j]];
            } else {
#pragma GCC unroll 32
                for (int j = 0; j < kStep; ++j) ++singles[indices[j]];
            }
            const __m512i ui = _mm512_castps_si512(ul), vi = _mm512_castps_si512(vl);
            if (__builtin_expect(near != 0, 0)) {
                exact_indices(p, *tally->binning, paired, indices);
            } else if (paired) {
                // u · slots + v · 1 in one multiply-add of 16-bit words.
                const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaau, ui, _mm512_slli_epi32(vi, 16));
                const __m512i pair = _mm512_madd_epi16(words, slots);
                const __mmask16 both_first = _mm512_testn_epi32_mask(pair, pair);
                _mm512_storeu_si512(indices, _mm512_mask_mov_epi32(pair, both_first, lanes0));
            } else {
                const __m512i us = _mm512_sub_epi32(ui, magic_bits), vs = _mm512_sub_epi32(vi, magic_bits);
                const __mmask16 u_first = _mm512_testn_epi32_mask(us, us), v_first = _mm512_testn_epi32_mask(vs, vs);
                _mm512_storeu_si512(indices, _mm512_mask_mov_epi32(us, u_first, lanes0));
                _mm512_storeu_si512(indices + 16, _mm512_mask_mov_epi32(vs, v_first, lanes1));
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const __m512d w = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8 * k));
            const __m512d d = shifted ? _mm512_sub_pd(w, centre) : w, q = _mm512_mul_pd(d, d);
            a[k % 2] = _mm512_add_pd(a[k % 2], _mm512_abs_pd(w));
            s1[k % 2] = _mm512_add_pd(s1[k % 2], d);
            // Not + q: the units that only add are busier than those that also multiply.
            s2[k % 2] = _mm512_fmadd_pd(d, d, s2[k % 2]);
            s3[k % 2] = _mm512_fmadd_pd(q, d, s3[k % 2]);
            s4[k % 2] = _mm512_fmadd_pd(q, q, s4[k % 2]);
        }
    }
    if constexpr (counting) tally->position = position;
    return {double(n),
            shift,
            _mm512_reduce_add_pd(_mm512_add_pd(a[0], a[1])),
            _mm512_reduce_add_pd(_mm512_add_pd(s1[0], s1[1])),
            _mm512_reduce_add_pd(_mm512_add_pd(s2[0], s2[1])),
            _mm512_reduce_add_pd(_mm512_add_pd(s3[0], s3[1])),
            _mm512_reduce_add_pd(_mm512_add_pd(s4[0], s4[1])),
            _mm512_reduce_min_ps(_mm512_min_ps(low0, low1)),
            _mm512_reduce_max_ps(_mm512_max_ps(high0, high1))};
}

#endif

}  // namespace

bool has_avx512() {
#if EAPTK_AVX512
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

#if EAPTK_AVX512
namespace {
template <bool shifted>
Kernel choose_avx512(bool counting, bool paired) {
    if (!counting) return avx512_block<false, false, shifted>;
    return paired ? avx512_block<true, true, shifted> : avx512_block<true, false, shifted>;
}
}  // namespace
#endif

Kernel choose_kernel(bool counting, bool paired, bool shifted, bool portable) {
#if EAPTK_AVX512
    if (!portable && has_avx512()) {
        return shifted ? choose_avx512<true>(counting, paired) : choose_avx512<false>(counting, paired);
    }
#else
    (void)paired, (void)portable;
#endif
    (void)shifted;
    return counting ? portable_counting : portable_plain;
}

}  // namespace eaptk

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

void count(const Tally& tally, const std::int32_t* indices, int begin, int end) {
    if (tally.paired) {
        for (int i = begin; i < end; ++i) ++tally.pairs[indices[i]];
    } else {
        for (int i = begin; i < end; ++i) ++tally.singles[indices[i]];
    }
}

namespace {

// A float32 mean is close enough to centre the moments, unless its sum overflowed.
double centre(float mean, const float* x, int n) {
    if (std::isfinite(mean)) return mean;
    double exact = 0;
    for (int i = 0; i < n; ++i) exact += x[i];
    return exact / n;
}

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
BlockSums portable_sums(const float* x, int n) {
    float sum[kWidth] = {}, low[kWidth], high[kWidth];
    for (int j = 0; j < kWidth; ++j) low[j] = high[j] = x[j];
    for (int i = 0; i < n; i += kWidth) {
        for (int j = 0; j < kWidth; ++j) {
            const float w = x[i + j];
            sum[j] += w;
            low[j] = w < low[j] ? w : low[j];
            high[j] = w > high[j] ? w : high[j];
        }
    }
    float total = 0;
    for (int j = 0; j < kWidth; ++j) total += sum[j];
    const double shift = centre(total / n, x, n);

    double a[kWidth] = {}, s1[kWidth] = {}, s2[kWidth] = {}, s3[kWidth] = {}, s4[kWidth] = {};
    for (int i = 0; i < n; i += kWidth) {
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

EAPTK_CLONES
void portable_indices(const float* x, int n, const Binning& binning, bool paired, std::int32_t* indices) {
    const float low = binning.scale_low, high = binning.scale_high, limit = binning.limit;
    const std::int32_t slots = binning.slots();
    for (int i = 0; i < n; i += kStep) {
        std::int32_t* out = indices + (paired ? i / 2 : i);
        std::int32_t bins[kStep], near = 0;
        for (int j = 0; j < kStep; ++j) {
            const float size = std::fabs(x[i + j]), a = size < limit ? size : limit;
            bins[j] = std::int32_t(a * low);
            near |= bins[j] ^ std::int32_t(a * high);
        }
        if (near) {
            exact_indices(x + i, binning, paired, out);
        } else if (paired) {
            for (int j = 0; j < kStep / 2; ++j) out[j] = bins[j] * slots + bins[j + kStep / 2];
        } else {
            for (int j = 0; j < kStep; ++j) out[j] = bins[j];
        }
    }
}

BlockSums portable_counting(const float* x, int n, const Tally* tally) {
    portable_indices(x, n, *tally->binning, tally->paired, tally->indices);
    count(*tally, tally->previous, 0, tally->paired ? n / 2 : n);
    return portable_sums(x, n);
}

BlockSums portable_plain(const float* x, int n, const Tally*) { return portable_sums(x, n); }

#if EAPTK_AVX512

#define EAPTK_TARGET __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))

// Memory is read once, and the next block fetched meanwhile. The shift is the mean of every fourth step, at least
// a quarter of the block, so it lies within √3 standard deviations of the block's mean (Cauchy-Schwarz), and
// moving the moments to the exact mean cancels a few bits at worst. Two accumulators a quantity hide the latency
// of an addition.
template <bool counting, bool paired>
EAPTK_TARGET BlockSums avx512_block(const float* x, int n, const Tally* tally) {
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    __m512 low0 = _mm512_loadu_ps(x), low1 = low0, high0 = low0, high1 = low0;
    int m = 0;
    for (int i = 0; i < n; i += 4 * kStep, m += kStep) {
        sum0 = _mm512_add_ps(sum0, _mm512_loadu_ps(x + i));
        sum1 = _mm512_add_ps(sum1, _mm512_loadu_ps(x + i + 16));
    }
    const double shift = centre(_mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1)) / m, x, n);
    const __m512d mean = _mm512_set1_pd(shift);

    __m512d a[2], s1[2], s2[2], s3[2], s4[2];
    for (int k = 0; k < 2; ++k) a[k] = s1[k] = s2[k] = s3[k] = s4[k] = _mm512_setzero_pd();

    std::uint16_t* const pairs = counting ? tally->pairs : nullptr;
    std::uint32_t* const singles = counting ? tally->singles : nullptr;
    const __m512 magic = _mm512_set1_ps(0x1p23f - 0.5f);
    const __m512i first_bin = _mm512_set1_epi32(0x4b000000);  // the bit pattern of 2^23
    __m512 scale_low{}, scale_high{}, limit{};
    __m512i stride{}, lanes0{}, lanes1{};
    if constexpr (counting) {
        const Binning& binning = *tally->binning;
        scale_low = _mm512_set1_ps(binning.scale_low);
        scale_high = _mm512_set1_ps(binning.scale_high);
        limit = _mm512_set1_ps(binning.limit);
        stride = _mm512_set1_epi32(0x10000 | binning.slots());
        const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        lanes0 = _mm512_add_epi32(iota, _mm512_set1_epi32(tally->lanes));
        lanes1 = _mm512_add_epi32(lanes0, _mm512_set1_epi32(16));
    }

    for (int i = 0; i < n; i += kStep) {
        const float* p = x + i;
        __builtin_prefetch(p + n);
        __builtin_prefetch(p + n + 16);
        const __m512 x0 = _mm512_loadu_ps(p), x1 = _mm512_loadu_ps(p + 16);
        low0 = _mm512_min_ps(low0, x0);
        low1 = _mm512_min_ps(low1, x1);
        high0 = _mm512_max_ps(high0, x0);
        high1 = _mm512_max_ps(high1, x1);
        if constexpr (counting) {
            // min returns its second operand for NaN, which then counts as above the range.
            const __m512 u = _mm512_min_ps(_mm512_abs_ps(x0), limit);
            const __m512 v = _mm512_min_ps(_mm512_abs_ps(x1), limit);
            const __m512i ul = _mm512_castps_si512(_mm512_fmadd_ps(u, scale_low, magic));
            const __m512i uh = _mm512_castps_si512(_mm512_fmadd_ps(u, scale_high, magic));
            const __m512i vl = _mm512_castps_si512(_mm512_fmadd_ps(v, scale_low, magic));
            const __m512i vh = _mm512_castps_si512(_mm512_fmadd_ps(v, scale_high, magic));
            const unsigned near = _mm512_cmpneq_epi32_mask(ul, uh) | _mm512_cmpneq_epi32_mask(vl, vh);
            const __mmask16 u_first = _mm512_cmple_epi32_mask(ul, first_bin);
            std::int32_t* indices = tally->indices + (paired ? i / 2 : i);
            if (__builtin_expect(near != 0, 0)) {
                exact_indices(p, *tally->binning, paired, indices);
            } else if (paired) {
                // The low 16 bits are the slot, −1 included: u · slots + 1 · v in one multiply-add.
                const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaau, ul, _mm512_slli_epi32(vl, 16));
                const __mmask16 both = _mm512_mask_cmple_epi32_mask(u_first, vl, first_bin);
                const __m512i pair = _mm512_mask_mov_epi32(_mm512_madd_epi16(words, stride), both, lanes0);
                _mm512_storeu_si512(indices, pair);
            } else {
                const __mmask16 v_first = _mm512_cmple_epi32_mask(vl, first_bin);
                const __m512i u_slot = _mm512_sub_epi32(ul, first_bin), v_slot = _mm512_sub_epi32(vl, first_bin);
                _mm512_storeu_si512(indices, _mm512_mask_mov_epi32(u_slot, u_first, lanes0));
                _mm512_storeu_si512(indices + 16, _mm512_mask_mov_epi32(v_slot, v_first, lanes1));
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const __m512d w = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8 * k));
            const __m512d d = _mm512_sub_pd(w, mean), q = _mm512_mul_pd(d, d);
            a[k % 2] = _mm512_add_pd(a[k % 2], _mm512_abs_pd(w));
            s1[k % 2] = _mm512_add_pd(s1[k % 2], d);
            s2[k % 2] = _mm512_add_pd(s2[k % 2], q);
            s3[k % 2] = _mm512_fmadd_pd(q, d, s3[k % 2]);
            s4[k % 2] = _mm512_fmadd_pd(q, q, s4[k % 2]);
        }
        if constexpr (counting) {
            const std::int32_t* previous = tally->previous + (paired ? i / 2 : i);
            if constexpr (paired) {
#pragma GCC unroll 16
                for (int j = 0; j < kStep / 2; ++j) ++pairs[previous[j]];
            } else {
#pragma GCC unroll 32
                for (int j = 0; j < kStep; ++j) ++singles[previous[j]];
            }
        }
    }
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

Kernel choose_kernel(bool counting, bool paired, bool portable) {
#if EAPTK_AVX512
    if (!portable && has_avx512()) {
        if (!counting) return avx512_block<false, false>;
        return paired ? avx512_block<true, true> : avx512_block<true, false>;
    }
#else
    (void)portable;
#endif
    return counting ? portable_counting : portable_plain;
}

}  // namespace eaptk

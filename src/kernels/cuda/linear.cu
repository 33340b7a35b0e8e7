// Matrix products. `linear_*` takes up to 64 rows a block and reads weights straight into
// registers, once: it is for steps whose time is that of reading weights. `product` is the usual
// tiled product for many rows.
//
// Rows of an input are padded with zeros to a multiple of 32 values, matrices to multiples of 128
// inputs and 16 outputs, so that loads need no bounds but that of rows.
#include "common.cuh"

constexpr int LINEAR_WARPS = 8;

/// What happens to a sum.
constexpr u32 STORE = 0, ADD = 1, GELU = 2, TANH = 3, RELU = 4;

struct LinearArgs {
    const Step *step;
    const u16 *input;  // bf16
    const float *bias;  // or null
    Matrix weight;
    View output;
    u32 stride;  // of the input
    u32 gathered;
    u32 epilogue;
    u32 gated;  // 0, or how many outputs there are of silu(gate) × up: gates first, then ups
    // What the input is the norm of, for kernels that normalise:
    const float *full;
    const float *scales;
    u32 full_stride;
    float eps;
    // Where several blocks share a tile:
    float *parts;  // their sums
    u32 *arrived;  // how many of them are done, by tile; 0 between products
};

__device__ __forceinline__ float finished(const LinearArgs &a, u32 row, u32 output, float y) {
    if (a.bias) y += a.bias[output];
    if (a.epilogue == ADD) y += read(a.output, row, output);
    if (a.epilogue == GELU) y = 0.5f * y * (1.0f + erff(y * 0.70710678f));
    if (a.epilogue == TANH) y = tanhf(y);
    if (a.epilogue == RELU) y = y > 0.0f ? y : 0.0f;
    return y;
}

__device__ __forceinline__ void finish(const LinearArgs &a, u32 row, u32 output, float y) {
    write(a.output, row, output, finished(a, row, output, y));
}

/// Writes two values, the first to an even column.
__device__ __forceinline__ void write_pair(const View &view, u32 row, u32 column, float x,
                                           float y) {
    if (view.half && view.stride % 2 == 0) {
        ((u32 *)view.data)[((u64)row * view.stride + column) / 2] = pack_bf16(x, y);
        return;
    }
    write(view, row, column, x);
    write(view, row, column + 1, y);
}

/// Two outputs of a row, the first with an even number.
__device__ __forceinline__ void finish_pair(const LinearArgs &a, u32 row, u32 output, float x,
                                            float y) {
    x = finished(a, row, output, x);
    if (output + 1 < a.weight.outputs) {
        write_pair(a.output, row, output, x, finished(a, row, output + 1, y));
    } else {
        write(a.output, row, output, x);
    }
}

// The order of inputs inside a product is free if both sides agree. Lane (g, t) loads 8
// neighbouring inputs `32 j + 8 t` of its row at once, and takes the first four as its part of one
// 16-wide product, the last four as its part of another.

/// 8 inputs of rows `row` and `row + 8` as parts of two products.
struct Rows {
    uint4 low, high;
};

__device__ __forceinline__ Rows load_rows(const LinearArgs &a, u32 row, u32 rows, u32 column) {
    const uint4 zero = {0, 0, 0, 0};
    const u16 *from = a.input + (u64)row * a.stride + column;
    Rows x;
    x.low = row < rows ? *(const uint4 *)from : zero;
    x.high = row + 8 < rows ? *(const uint4 *)(from + 8 * a.stride) : zero;
    return x;
}

/// Reads whole 16 bytes, or 8.
template <int COUNT>
__device__ __forceinline__ void load_words(u32 (&to)[COUNT], const u32 *from) {
    if constexpr (COUNT == 2) {
        uint2 two = *(const uint2 *)from;
        to[0] = two.x, to[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            uint4 four = *(const uint4 *)(from + i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    }
}

/// As `load_rows`, of rows that are yet to be normalised: they come scaled by the norm's weights,
/// and their squares are added up, by which the whole sum is divided in the end.
__device__ __forceinline__ Rows load_rows_to_norm(const LinearArgs &a, u32 row, u32 rows,
                                                  u32 column, float (&squares)[2]) {
    u32 scale[8];
    load_words(scale, (const u32 *)(a.scales + column));
    auto part = [&](u32 of, float &sum) -> uint4 {
        if (of >= rows) return {0, 0, 0, 0};
        u32 words[8], pairs[4];
        load_words(words, (const u32 *)(a.full + (u64)of * a.full_stride + column));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float x = __uint_as_float(words[2 * i]), y = __uint_as_float(words[2 * i + 1]);
            sum += x * x;
            sum += y * y;
            pairs[i] = pack_bf16(x * __uint_as_float(scale[2 * i]),
                                 y * __uint_as_float(scale[2 * i + 1]));
        }
        return {pairs[0], pairs[1], pairs[2], pairs[3]};
    };
    Rows x;
    x.low = part(row, squares[0]);
    x.high = part(row + 8, squares[1]);
    return x;
}

__device__ __forceinline__ void first_part(u32 (&part)[4], const Rows &x) {
    part[0] = x.low.x, part[1] = x.high.x, part[2] = x.low.y, part[3] = x.high.y;
}
__device__ __forceinline__ void second_part(u32 (&part)[4], const Rows &x) {
    part[0] = x.low.z, part[1] = x.high.z, part[2] = x.low.w, part[3] = x.high.w;
}

/// 128 inputs of 8 outputs in bf16.
struct Bf16 {
    static constexpr bool GROUPED = false, SUMMED = false;
    static constexpr int PARTS = 1;
    uint4 words[4];

    __device__ __forceinline__ void load(const Matrix &m, u32 output, u32 super, u32 g, u32 t) {
        const u16 *row = (const u16 *)m.values + ((u64)(output + g) * m.supers + super) * SUPER;
        for (int j = 0; j < 4; ++j) words[j] = *(const uint4 *)(row + 32 * j + 8 * t);
    }

    __device__ __forceinline__ uint4 values(int j) const { return words[j]; }
    __device__ __forceinline__ void scaled(int, const float (&)[4], float, float,
                                           float (&)[4]) const {}
};

/// 128 inputs of 8 outputs in 4 or 8 bits, with a scale and perhaps a minimum for each 32 inputs,
/// or for each 16. 4-bit values enter the product as 128 + q, 8-bit ones, which are stored 128 too
/// large, as q: bf16 holds both exactly. Scales come afterwards.
template <int BITS, bool MINIMUM, bool HALVES>
struct Quants {
    static constexpr bool GROUPED = true, SUMMED = MINIMUM;
    static constexpr int PARTS = HALVES ? 2 : 1;
    /// Words of scales for 128 inputs: a scale and a minimum each, or two scales.
    static constexpr int SCALES = MINIMUM ? 4 * PARTS : 2 * PARTS;
    static_assert(BITS == 8 || MINIMUM, "4-bit values are above zero");
    u32 words[BITS];
    u32 scales[2][SCALES];

    __device__ __forceinline__ void load(const Matrix &m, u32 output, u32 super, u32 g, u32 t) {
        const u32 *row = (const u32 *)m.values + ((u64)(output + g) * m.supers + super) * 4 * BITS;
        load_words(words, row + t * BITS);
        for (int i = 0; i < 2; ++i) {
            u64 at = (u64)(output + 2 * t + i) * m.supers + super;
            load_words(scales[i], (const u32 *)m.scales + at * SCALES);
        }
    }

    /// Two bytes, 128 too large each, as bf16: 2^23 + byte is an f32, and q needs 7 bits.
    __device__ __forceinline__ static u32 pair(u32 word, int i) {
        float low = __uint_as_float(__byte_perm(word, 0x4B000000, 0x7440 | i));
        float high = __uint_as_float(__byte_perm(word, 0x4B000000, 0x7440 | (i + 1)));
        return __byte_perm(__float_as_uint(low - 8388736.0f), __float_as_uint(high - 8388736.0f),
                           0x7632);
    }

    __device__ __forceinline__ uint4 values(int j) const {
        if (BITS == 4) {
            u32 word = words[j % BITS];
            return {(word & 0x000F000F) | 0x43004300, (word >> 4 & 0x000F000F) | 0x43004300,
                    (word >> 8 & 0x000F000F) | 0x43004300, (word >> 12 & 0x000F000F) | 0x43004300};
        }
        u32 first = words[2 * j % BITS], second = words[(2 * j + 1) % BITS];
        return {pair(first, 0), pair(first, 2), pair(second, 0), pair(second, 2)};
    }

    /// Part `part` of group `j` is done: `group` are sums of x × q, `low` and `high` those of x in
    /// the two rows.
    __device__ __forceinline__ void scaled(int part, const float (&group)[4], float low,
                                           float high, float (&sums)[4]) const {
        for (int i = 0; i < 2; ++i) {
            u32 word = scales[i][MINIMUM ? part : part / 2];
            float scale = from_f16((u16)(MINIMUM || part % 2 == 0 ? word : word >> 16));
            sums[i] += scale * group[i];
            sums[2 + i] += scale * group[2 + i];
            if (MINIMUM) {
                float shift = from_f16((u16)(word >> 16)) - (BITS == 4 ? 128.0f * scale : 0.0f);
                sums[i] += shift * low;
                sums[2 + i] += shift * high;
            }
        }
    }
};

using Q4 = Quants<4, true, false>;
using Q4Halves = Quants<4, true, true>;
using Q8 = Quants<8, false, false>;
using Q8Minimum = Quants<8, true, false>;
using Q8Halves = Quants<8, true, true>;

/// Up to `16 MT` rows and `8 NT` outputs a block, or 8 gated ones with NT = 2; its warps share the
/// inputs, and add up in the same order whatever MT and NT are, so that a row's sum does not depend
/// on its company. NORMED: what is multiplied is the norm of rows, which is made on the way.
template <class W, int MT, int NT, bool NORMED>
__device__ __forceinline__ void linear(const LinearArgs &a) {
    SHARED_MEMORY(shared);
    bool gated = NT == 2 && a.gated != 0;
    u32 first_row = blockIdx.y * 16 * MT, first_output = blockIdx.x * (gated ? 8 : 8 * NT);
    u32 apart = gated ? a.gated : 8;
    u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sums[MT][NT][4] = {};
    float squares[MT][2] = {};
    // Weights are nobody's results: the first are on their way before this kernel's turn comes.
    // Where there are registers, so are the next while some are multiplied.
    constexpr bool AHEAD = MT * NT <= 4;
    W weights[NT], next[NT];
    auto load = [&](W (&to)[NT], u32 super) {
        if (super >= a.weight.supers) return;
#pragma unroll
        for (int n = 0; n < NT; ++n) to[n].load(a.weight, first_output + apart * n, super, g, t);
    };
    load(weights, warp);
    begin();
    u32 rows = row_count(a.step, a.gathered);
    if (first_row >= rows) return;
    for (u32 super = warp; super < a.weight.supers; super += LINEAR_WARPS) {
        if (AHEAD) load(next, super + LINEAR_WARPS);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32 column = super * SUPER + 32 * j;
            if (column >= a.weight.inputs) break;
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                u32 row = first_row + 16 * m + g;
                Rows x = NORMED ? load_rows_to_norm(a, row, rows, column + 8 * t, squares[m])
                                : load_rows(a, row, rows, column + 8 * t);
                u32 first[4], second[4];
                first_part(first, x);
                second_part(second, x);
#pragma unroll
                for (int part = 0; part < W::PARTS; ++part) {
                    // Of two halves of a group, lanes hold one each: the other's count as zero.
                    u32 mask = W::PARTS == 1 || (int)t / 2 == part ? 0xFFFFFFFF : 0;
                    float total[4] = {};
                    if (W::SUMMED) {
                        // Times one: what each row's inputs add up to.
                        mma_bf16(total, first, 0x3F803F80 & mask, 0x3F803F80 & mask);
                        mma_bf16(total, second, 0x3F803F80 & mask, 0x3F803F80 & mask);
                    }
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        uint4 w = weights[n].values(j);
                        if (W::GROUPED) {
                            float group[4] = {};
                            mma_bf16(group, first, w.x & mask, w.y & mask);
                            mma_bf16(group, second, w.z & mask, w.w & mask);
                            weights[n].scaled(j * W::PARTS + part, group, total[0], total[2],
                                              sums[m][n]);
                        } else {
                            mma_bf16(sums[m][n], first, w.x, w.y);
                            mma_bf16(sums[m][n], second, w.z, w.w);
                        }
                    }
                }
            }
        }
        if (AHEAD) {
#pragma unroll
            for (int n = 0; n < NT; ++n) weights[n] = next[n];
        } else {
            load(weights, super + LINEAR_WARPS);
        }
    }
    constexpr int CELLS = 16 * MT * 8 * NT;
    float *parts = (float *)shared, *norms = parts + LINEAR_WARPS * CELLS;
    if (NORMED) {
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            float sum = squares[i / 2][i % 2];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (t == 0) norms[warp * 16 * MT + 8 * i + g] = sum;
        }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 row = 16 * m + g + i / 2 * 8, output = 8 * n + 2 * t + i % 2;
                parts[warp * CELLS + row * 8 * NT + output] = sums[m][n][i];
            }
        }
    }
    __syncthreads();
    auto sum_of = [&](u32 cell) {
        float sum = 0.0f;
        for (int w = 0; w < LINEAR_WARPS; ++w) sum += parts[w * CELLS + cell];
        if (!NORMED) return sum;
        float square = 0.0f;
        for (int w = 0; w < LINEAR_WARPS; ++w) square += norms[w * 16 * MT + cell / (8 * NT)];
        return sum * rsqrtf(square / (float)a.weight.inputs + a.eps);
    };
    if (gated) {
        for (u32 i = threadIdx.x; i < 16 * MT * 8; i += 32 * LINEAR_WARPS) {
            u32 row = first_row + i / 8, cell = i / 8 * 8 * NT + i % 8;
            float y = silu_times(sum_of(cell), sum_of(cell + 8));
            if (row < rows) write(a.output, row, first_output + i % 8, y);
        }
        return;
    }
    for (u32 cell = threadIdx.x; cell < CELLS; cell += 32 * LINEAR_WARPS) {
        u32 row = first_row + cell / (8 * NT), output = first_output + cell % (8 * NT);
        float sum = sum_of(cell);
        if (row < rows && output < a.weight.outputs) finish(a, row, output, sum);
    }
}

#define LINEAR(name, W, MT, NT, NORMED)                                \
    extern "C" __global__ void __launch_bounds__(32 * LINEAR_WARPS)    \
    name(const __grid_constant__ LinearArgs a) { linear<W, MT, NT, NORMED>(a); }

LINEAR(linear_bf16_16x8, Bf16, 1, 1, false)
LINEAR(linear_bf16_16x8_norm, Bf16, 1, 1, true)
LINEAR(linear_bf16_16x16, Bf16, 1, 2, false)
LINEAR(linear_bf16_16x16_norm, Bf16, 1, 2, true)
LINEAR(linear_bf16_32x16, Bf16, 2, 2, false)
LINEAR(linear_bf16_64x16, Bf16, 4, 2, false)
LINEAR(linear_q4_16x8, Q4, 1, 1, false)
LINEAR(linear_q4_16x8_norm, Q4, 1, 1, true)
LINEAR(linear_q4_16x16, Q4, 1, 2, false)
LINEAR(linear_q4_16x16_norm, Q4, 1, 2, true)
LINEAR(linear_q4_32x16, Q4, 2, 2, false)
LINEAR(linear_q4_64x16, Q4, 4, 2, false)
LINEAR(linear_q4h_16x8, Q4Halves, 1, 1, false)
LINEAR(linear_q4h_16x8_norm, Q4Halves, 1, 1, true)
LINEAR(linear_q4h_16x16, Q4Halves, 1, 2, false)
LINEAR(linear_q4h_16x16_norm, Q4Halves, 1, 2, true)
LINEAR(linear_q4h_32x16, Q4Halves, 2, 2, false)
LINEAR(linear_q4h_64x16, Q4Halves, 4, 2, false)
LINEAR(linear_q8_16x8, Q8, 1, 1, false)
LINEAR(linear_q8_16x8_norm, Q8, 1, 1, true)
LINEAR(linear_q8_16x16, Q8, 1, 2, false)
LINEAR(linear_q8_16x16_norm, Q8, 1, 2, true)
LINEAR(linear_q8_32x16, Q8, 2, 2, false)
LINEAR(linear_q8_64x16, Q8, 4, 2, false)
LINEAR(linear_q8m_16x8, Q8Minimum, 1, 1, false)
LINEAR(linear_q8m_16x8_norm, Q8Minimum, 1, 1, true)
LINEAR(linear_q8m_16x16, Q8Minimum, 1, 2, false)
LINEAR(linear_q8m_16x16_norm, Q8Minimum, 1, 2, true)
LINEAR(linear_q8m_32x16, Q8Minimum, 2, 2, false)
LINEAR(linear_q8m_64x16, Q8Minimum, 4, 2, false)
LINEAR(linear_q8h_16x8, Q8Halves, 1, 1, false)
LINEAR(linear_q8h_16x8_norm, Q8Halves, 1, 1, true)
LINEAR(linear_q8h_16x16, Q8Halves, 1, 2, false)
LINEAR(linear_q8h_16x16_norm, Q8Halves, 1, 2, true)
LINEAR(linear_q8h_32x16, Q8Halves, 2, 2, false)
LINEAR(linear_q8h_64x16, Q8Halves, 4, 2, false)

#undef LINEAR

// What lanes take of a group of 32 inputs, and values of few bits on their way into a product: for
// `linear.cu` and `product_quants.cu`. How they lie in memory, `matrices.rs` says.
#pragma once

#include "common.cuh"

// The order of inputs inside a product is free if both sides agree. Lane (g, t) takes 8 of the 32
// inputs of group `j` of its row, the first four as its part of one 16-wide product, the last four
// as its part of another: neighbouring ones from `8 t` on, or, where halves of a group have scales
// of their own, four of each half, so that each product is one half's.

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

/// Where lane `t` finds its first four inputs of a group, and how much further its last four.
template <bool HALVES>
__device__ __forceinline__ u32 lane_inputs(u32 t) {
    return HALVES ? 4 * t : 8 * t;
}
template <bool HALVES>
constexpr u32 LAST_INPUTS = HALVES ? 16 : 4;

/// A lane's inputs of a group: eight from `first` on, or four, and four from `last` on.
template <bool HALVES>
__device__ __forceinline__ uint4 load_inputs(const void *first, const void *last) {
    if (!HALVES) return *(const uint4 *)first;
    uint2 low = *(const uint2 *)first, high = *(const uint2 *)last;
    return {low.x, low.y, high.x, high.y};
}

/// Values of 4 or 8 bits with a scale and perhaps a minimum for each 32 inputs, or for each 16.
/// 4-bit values enter the product as 128 + q, 8-bit ones, which are stored 128 too large, as q:
/// bf16 holds both exactly. Scales come afterwards.
template <int BITS, bool MINIMUM, bool HALVED>
struct Packing {
    static constexpr bool SUMMED = MINIMUM, HALVES = HALVED;
    static constexpr int PARTS = HALVED ? 2 : 1;
    /// Words of a lane's values in a group, and words of an output's scales in `GROUPS` groups: a
    /// scale and a minimum each, or two scales.
    static constexpr int WORDS = BITS / 4;
    template <int GROUPS>
    static constexpr int SCALES = MINIMUM ? GROUPS * PARTS : GROUPS * PARTS / 2;
    /// Groups of which 64 bytes hold an output's values.
    static constexpr int CHUNK = 4 / WORDS;
    static_assert(BITS == 8 || MINIMUM, "4-bit values are above zero");

    /// Two bytes, 128 too large each, as bf16: their low seven bits, 128 more, less that or twice
    /// that by the highest.
    __device__ __forceinline__ static u32 bytes(u32 word) {
        return add_bf16(merge_bits(word, 0x007F007F, 0x43004300),
                        merge_absent_bits(word, 0x00800080, 0xC300C300));
    }

    /// A lane's values in a group.
    __device__ __forceinline__ static uint4 widened(const u32 *words) {
        u32 first = words[0];
        if constexpr (BITS == 4) {
            auto two = [](u32 word) { return merge_bits(word, 0x000F000F, 0x43004300); };
            return {two(first), two(first >> 4), two(first >> 8), two(first >> 12)};
        } else {
            u32 last = words[1];
            return {bytes(first), bytes(first >> 8), bytes(last), bytes(last >> 8)};
        }
    }

    /// By what the products of group `j`, or of its halves, are multiplied, and the sums of its
    /// inputs; `scales` are an output's.
    __device__ __forceinline__ static void scales_of(const u32 *scales, int j,
                                                     float (&to)[PARTS][2]) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            int part = j * PARTS + i;
            u32 word = scales[MINIMUM ? part : part / 2];
            to[i][0] = from_f16((u16)(MINIMUM || part % 2 == 0 ? word : word >> 16));
            if (!MINIMUM) continue;
            to[i][1] = from_f16((u16)(word >> 16)) - (BITS == 4 ? 128.0f * to[i][0] : 0.0f);
        }
    }
};

using Q4 = Packing<4, true, false>;
using Q4Halves = Packing<4, true, true>;
using Q8 = Packing<8, false, false>;
using Q8Minimum = Packing<8, true, false>;
using Q8Halves = Packing<8, true, true>;

/// What a lane holds of the values of a group in a tile of 16 outputs: of outputs `g` and `g + 8`.
struct Lines {
    u32 first[4], second[4];
};

__device__ __forceinline__ Lines lines(const uint4 &low, const uint4 &high) {
    return {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
}

// Outputs are the 16 lines of an instruction and rows its 8 columns: so what a lane loads of a row
// is in the right registers, and what values of few bits become is made in them. Lane (g, t) gets
// sums of outputs `g` and `g + 8`, of rows 2t and 2t + 1 each.

/// Products of a group, or of its halves, with eight rows, of which `x` are a lane's inputs.
template <class P>
__device__ __forceinline__ void multiply(float (&to)[P::PARTS][4], const Lines &of,
                                         const uint4 &x) {
#pragma unroll
    for (int part = 0; part < P::PARTS; ++part) {
        for (int i = 0; i < 4; ++i) to[part][i] = 0.0f;
    }
    mma_bf16(to[0], of.first, x.x, x.y);
    mma_bf16(to[P::PARTS - 1], of.second, x.z, x.w);
}

/// Ones in the place of values: their products are what a row's inputs add up to.
__device__ __forceinline__ uint4 ones() {
    return {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
}

/// What the inputs of eight rows add up to, by part; all outputs have the same.
template <class P>
__device__ __forceinline__ void add_inputs(float (&totals)[P::PARTS][2], const uint4 &x) {
    if (!P::SUMMED) return;
    float sums[P::PARTS][4];
    multiply<P>(sums, lines(ones(), ones()), x);
#pragma unroll
    for (int part = 0; part < P::PARTS; ++part) {
        totals[part][0] = sums[part][0], totals[part][1] = sums[part][1];
    }
}

/// Adds the products of a group with eight rows, scaled, for the first `COUNT` times 8 outputs.
template <class P, int COUNT>
__device__ __forceinline__ void add_scaled(float (&sums)[4], const float (&group)[P::PARTS][4],
                                           const float (&totals)[P::PARTS][2],
                                           const float (&scales)[COUNT][P::PARTS][2]) {
#pragma unroll
    for (int part = 0; part < P::PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < 2 * COUNT; ++i) {
            const float(&scale)[2] = scales[i / 2][part];
            sums[i] += scale[0] * group[part][i];
            if (P::SUMMED) sums[i] += scale[1] * totals[part][i % 2];
        }
    }
}

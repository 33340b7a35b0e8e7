// Chooses tokens: the same arithmetic as `sample.rs`, so that the same logits give the same token.
// Probabilities are 32-bit fixed point, and sums of integers have one value in any order.
#include "common.cuh"

constexpr int SAMPLE_THREADS = 1024;
constexpr u32 SAMPLE_ONE = 1u << 30;

struct SampleArgs {
    const Step *step;
    View logits;
    u32 *weights;  // `vocabulary` for each draw
    u32 *seats;
    u32 *tokens;  // one for each draw
    u32 vocabulary;
    u32 unused;
};

/// `e^x × 2^30` rounded down, for x at most 0: the polynomial of `math.rs`, rounding by rounding.
__device__ __forceinline__ u32 fixed_exp(float x) {
    constexpr float ROUND = 12582912.0f;
    x = x > -100.0f ? x : -100.0f;
    x = x < 0.0f ? x : 0.0f;
    if (x < -87.0f) return 0;
    float t = __fmaf_rn(x, 1.44269504f, ROUND), n = __fsub_rn(t, ROUND);
    float r = __fmaf_rn(n, -0.69311523f, x);
    r = __fmaf_rn(n, -3.1946183e-5f, r);
    float p = 0.0013926176f;
    p = __fmaf_rn(p, r, 0.008363173f);
    p = __fmaf_rn(p, r, 0.041666556f);
    p = __fmaf_rn(p, r, 0.16666578f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    p = __uint_as_float(__float_as_uint(p) + (__float_as_uint(t) << 23));
    return (u32)(int)__fmul_rn(p, (float)SAMPLE_ONE);
}

/// 64 random bits for a position of a choice, by Philox-4x32-10.
__device__ __forceinline__ u64 random_bits(const Draw &draw) {
    u32 counter[4] = {draw.position, draw.choice, 0, 0};
    u32 key[2] = {draw.seed_low, draw.seed_high};
    for (int round = 0; round < 10; ++round) {
        u32 a_high = __umulhi(counter[0], 0xD2511F53), a_low = counter[0] * 0xD2511F53;
        u32 b_high = __umulhi(counter[2], 0xCD9E8D57), b_low = counter[2] * 0xCD9E8D57;
        counter[0] = b_high ^ counter[1] ^ key[0];
        counter[1] = b_low;
        counter[2] = a_high ^ counter[3] ^ key[1];
        counter[3] = a_low;
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return (u64)counter[1] << 32 | counter[0];
}

/// Values of a rank's widest digit.
constexpr u32 SAMPLE_BINS = 2048;

/// What the threads of a block share.
struct SampleShared {
    u64 histogram[SAMPLE_BINS];
    u64 masses[32];
    float peaks[32];
    u32 places[32];
    u64 need;
    u32 chosen;
};

/// A token's rank: its weight, of equal ones the lower id first.
__device__ __forceinline__ u64 rank_of(u32 weight, u32 id) { return (u64)weight << 32 | (u32)~id; }

/// Sum over the block, in every thread.
__device__ __forceinline__ u64 block_mass(u64 x, SampleShared &s) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor_wide(x, mask);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.masses[threadIdx.x / 32] = x;
    __syncthreads();
    u64 total = 0;
    for (int warp = 0; warp < SAMPLE_THREADS / 32; ++warp) total += s.masses[warp];
    return total;
}

/// The sum over the threads up to this one.
__device__ __forceinline__ u64 mass_up_to(u64 own, SampleShared &s) {
    // Of the lanes up to this one, then of the warps before.
    u64 sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
        u32 low = shuffle_up((u32)sum, distance), high = shuffle_up((u32)(sum >> 32), distance);
        if ((int)(threadIdx.x % 32) >= distance) sum += (u64)high << 32 | low;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) s.masses[threadIdx.x / 32] = sum;
    __syncthreads();
    for (u32 warp = 0; warp < threadIdx.x / 32; ++warp) sum += s.masses[warp];
    return sum;
}

/// Gives `take` the ids of this thread with what `read` has of them, `none` past the end. One block
/// reads the whole row: many loads must be on their way at once.
template <u32 AHEAD, class T, class Read, class Take>
__device__ __forceinline__ void for_each(u32 count, T none, const Read &read, const Take &take) {
    for (u32 first = threadIdx.x; first < count; first += AHEAD * SAMPLE_THREADS) {
        T x[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            u32 i = first + j * SAMPLE_THREADS;
            x[j] = i < count ? read(i) : none;
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) take(first + j * SAMPLE_THREADS, x[j]);
    }
}

/// Gives `take` the ids and weights of this thread with ranks from `floor` on.
template <class Take>
__device__ __forceinline__ void for_each_kept(const u32 *weights, u32 count, u64 floor,
                                              const Take &take) {
    auto read = [&](u32 i) { return weights[i]; };
    for_each<8>(count, 0u, read, [&](u32 i, u32 weight) {
        if (weight && rank_of(weight, i) >= floor) take(i, weight);
    });
}

/// The weight of all ranks from `floor` on.
__device__ __forceinline__ u64 mass_from(const u32 *weights, u32 count, u64 floor,
                                         SampleShared &s) {
    u64 sum = 0;
    for_each_kept(weights, count, floor, [&](u32, u32 weight) { sum += weight; });
    return block_mass(sum, s);
}

/// The least rank of the smallest set of highest ranks, none below `floor`, that holds `need`: of
/// weight, or of tokens. Found a digit at a time; `floor` if all together hold less.
template <bool WEIGHT>
__device__ __forceinline__ u64 least_rank(const u32 *weights, u32 count, u64 floor, u64 need,
                                          SampleShared &s) {
    constexpr u32 NONE = 0xFFFFFFFF;
    u64 prefix = 0;
    // Weights have digits of 10, 11 and 11 bits, and so have ids.
    for (int above = 64, width; above > 0; above -= width) {
        width = above % 32 == 0 ? 10 : 11;
        if (above == 32 && count <= 1u << 22) {
            // No id has any of these bits, of which ranks hold the opposite.
            prefix = prefix << width | ((1u << width) - 1);
            continue;
        }
        int shift = above - width;
        __syncthreads();
        for (u32 i = threadIdx.x; i < SAMPLE_BINS; i += SAMPLE_THREADS) s.histogram[i] = 0;
        if (threadIdx.x == 0) s.chosen = NONE;
        __syncthreads();
        // Most tokens have the same digit: a thread adds up as long as it does not change.
        u32 digit = 0;
        u64 sum = 0;
        for_each_kept(weights, count, floor, [&](u32 i, u32 weight) {
            u64 rank = rank_of(weight, i);
            if (above < 64 && rank >> above != prefix) return;
            u32 own = (u32)(rank >> shift) & ((1u << width) - 1);
            if (own != digit && sum) atomicAdd(&s.histogram[digit], sum), sum = 0;
            digit = own;
            sum += WEIGHT ? weight : 1;
        });
        if (sum) atomicAdd(&s.histogram[digit], sum);
        __syncthreads();
        // From the highest digit down, each thread has two.
        u32 high = SAMPLE_BINS - 1 - 2 * threadIdx.x;
        u64 first = s.histogram[high], both = first + s.histogram[high - 1];
        u64 up_to = mass_up_to(both, s), before = up_to - both;
        if (before < need && need <= up_to) {
            bool is_first = need <= before + first;
            s.chosen = is_first ? high : high - 1;
            s.need = need - before - (is_first ? 0 : first);
        }
        __syncthreads();
        if (s.chosen == NONE) return floor;
        prefix = prefix << width | s.chosen;
        need = s.need;
    }
    return prefix;
}

/// A row of logits as it is.
struct Plain {
    View logits;
    u32 row;

    __device__ __forceinline__ float operator()(u32 i) const { return read(logits, row, i); }
};

/// The largest logit in every thread, and the lowest place where it stands. NaN counts as minus
/// infinity.
template <class Logits>
__device__ __forceinline__ void find_peak(const Logits &logits, u32 count, SampleShared &s,
                                          float &peak, u32 &place) {
    peak = -INFINITY;
    place = 0xFFFFFFFF;
    for_each<16>(count, -INFINITY, logits, [&](u32 i, float x) {
        if (x > peak) peak = x, place = i;
    });
    for (int mask = 16; mask > 0; mask /= 2) {
        float other = shuffle_xor(peak, mask);
        u32 where = __float_as_uint(shuffle_xor(__uint_as_float(place), mask));
        if (other > peak || (other == peak && where < place)) peak = other, place = where;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.peaks[threadIdx.x / 32] = peak, s.places[threadIdx.x / 32] = place;
    __syncthreads();
    for (int warp = 0; warp < SAMPLE_THREADS / 32; ++warp) {
        float other = s.peaks[warp];
        u32 where = s.places[warp];
        if (other > peak || (other == peak && where < place)) peak = other, place = where;
    }
    if (place == 0xFFFFFFFF) place = 0;
}

/// The least rank that top-k, top-p and min-p keep, in this order.
__device__ __forceinline__ u64 floor_of(const Draw &draw, const u32 *weights, u32 count,
                                        SampleShared &s) {
    u64 floor = (u64)1 << 32;
    if (draw.top_k > 0 && draw.top_k < count) {
        floor = least_rank<false>(weights, count, floor, draw.top_k, s);
    }
    if (draw.top_p < 1.0f) {
        u64 total = mass_from(weights, count, floor, s);
        double share = (double)(draw.top_p > 0.0f ? draw.top_p : 0.0f) * (double)total;
        u64 need = (u64)ceil(share);
        need = need < 1 ? 1 : need > total ? total : need;
        u64 least = least_rank<true>(weights, count, floor, need, s);
        floor = least > floor ? least : floor;
    }
    if (draw.min_p > 0.0f) {
        double least = ceil((double)draw.min_p * (double)SAMPLE_ONE);
        u64 rank = (u64)(least < (double)SAMPLE_ONE ? (u32)least : SAMPLE_ONE) << 32;
        floor = rank > floor ? rank : floor;
    }
    return floor;
}

/// The token that `rest` falls on, where all kept weights lie side by side by id; in one thread
/// only, the others return false.
__device__ __forceinline__ bool token_at(const u32 *weights, u32 count, u64 floor, u64 rest,
                                         SampleShared &s, u32 &token) {
    u32 each = (count + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    u32 first = min(threadIdx.x * each, count), end = min(first + each, count);
    u64 own = 0;
    for (u32 i = first; i < end; ++i) {
        if (weights[i] && rank_of(weights[i], i) >= floor) own += weights[i];
    }
    u64 sum = mass_up_to(own, s);
    u64 before = sum - own;
    if (rest < before || rest >= sum) return false;
    rest -= before;
    for (u32 i = first; i < end; ++i) {
        if (!weights[i] || rank_of(weights[i], i) < floor) continue;
        token = i;
        if (rest < weights[i]) return true;
        rest -= weights[i];
    }
    return true;
}

/// Chooses a token; it is known to the one thread that returns true. `weights` is scratch, of
/// which a thread reads in `logits` only what it writes afterwards.
template <class Logits>
__device__ __forceinline__ bool choose(const Draw &draw, const Logits &logits, u32 *weights,
                                       u32 count, SampleShared &s, u32 &token) {
    float peak;
    find_peak(logits, count, s, peak, token);
    // Written so that NaN is greedy too.
    if (!(draw.temperature > 0.0f) || fabsf(peak) == INFINITY) return threadIdx.x == 0;
    for_each<8>(count, 0.0f, logits, [&](u32 i, float x) {
        if (i < count) weights[i] = fixed_exp(__fdiv_rn(__fsub_rn(x, peak), draw.temperature));
    });
    // Other threads of the block read them.
    __syncthreads();
    u64 floor = floor_of(draw, weights, count, s);
    u64 total = mass_from(weights, count, floor, s);
    u64 rest = __umul64hi(random_bits(draw), total);
    return token_at(weights, count, floor, rest, s, token);
}

/// A block a draw.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
sample(const __grid_constant__ SampleArgs a) {
    begin();
    SHARED_MEMORY(shared);
    SampleShared &s = *(SampleShared *)shared;
    if (blockIdx.x >= a.step->draws) return;
    Draw draw = a.step->draw[blockIdx.x];
    u32 *weights = a.weights + (u64)blockIdx.x * a.vocabulary;
    u32 token;
    if (choose(draw, Plain{a.logits, draw.row}, weights, a.vocabulary, s, token)) {
        a.tokens[blockIdx.x] = token;
        a.seats[draw.seat] = token;
    }
}

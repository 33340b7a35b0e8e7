// What few draws ask for besides: logits adjusted by bias and penalties and drawn from again, and
// log-probabilities of the logits as they are. The arithmetic of adjusting is that of `adjust.rs`,
// rounding by rounding, so that the same logits give the same token.
#include "common.cuh"

/// No row.
constexpr u32 NOWHERE = 0xFFFFFFFF;

/// Words of a draw's log-probabilities: the chosen token's, how many follow, then ids and values.
constexpr u32 TOP_MAX = 20, SCORE_WORDS = 2 + 2 * TOP_MAX;

/// Log-probability of what is impossible.
constexpr float IMPOSSIBLE = -9999.0f;

/// In a tally: the token has a bias, or stands in the prompt. Other bits count it in the answer.
constexpr u32 BIASED = 1u << 30, IN_PROMPT = 1u << 31;

struct Detail {
    u32 draw;      // which of the step's
    u32 adjusted;  // whether the token is drawn again
    u32 place;     // of its log-probabilities, or NOWHERE
    u32 top;       // log-probabilities of so many tokens
    u32 bias, biases;    // where they start, how many
    u32 prompt, prompts;
    u32 answer, answers;
    u32 last;  // the row whose input is one more token of the answer, or NOWHERE
    float repetition, frequency, presence;
};

/// Some of a step's details, with their tables.
struct Details {
    u32 count, unused;
    const Detail *detail;
    const uint2 *biases;  // token, and what is added
    const u32 *tokens;    // of prompts and answers
};

struct RefineArgs {
    const Step *step;
    const Details *details;
    View logits;
    u32 *weights;  // as in `sample`
    u32 *seats;
    u32 *tokens;
    u32 *scores;  // SCORE_WORDS a place
    u32 vocabulary;
    u32 unused;
};

/// A row of logits, adjusted.
struct Adjusted {
    Plain logits;
    Detail detail;
    const uint2 *biases;
    const u32 *tally;

    __device__ __forceinline__ float operator()(u32 i) const {
        float x = logits(i);
        u32 seen = tally[i];
        if (seen & BIASED) {
            for (u32 j = 0; j < detail.biases; ++j) {
                if (biases[j].x == i) x = __fadd_rn(x, __uint_as_float(biases[j].y));
            }
        }
        if (!(seen & ~BIASED)) return x;
        x = x > 0.0f ? __fdiv_rn(x, detail.repetition) : __fmul_rn(x, detail.repetition);
        u32 count = seen & ~(BIASED | IN_PROMPT);
        if (!count) return x;
        float cost = __fadd_rn(__fmul_rn(detail.frequency, (float)count), detail.presence);
        return __fsub_rn(x, cost);
    }
};

/// Notes for each token what it has to do with the text so far. Tokens beyond the row are passed
/// over.
__device__ __forceinline__ void count_tokens(const RefineArgs &a, const Detail &d, u32 *tally) {
    const Details &details = *a.details;
    for (u32 i = threadIdx.x; i < a.vocabulary; i += SAMPLE_THREADS) tally[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < d.biases; i += SAMPLE_THREADS) {
        u32 token = details.biases[d.bias + i].x;
        if (token < a.vocabulary) atomicOr(&tally[token], BIASED);
    }
    for (u32 i = threadIdx.x; i < d.prompts; i += SAMPLE_THREADS) {
        u32 token = details.tokens[d.prompt + i];
        if (token < a.vocabulary) atomicOr(&tally[token], IN_PROMPT);
    }
    for (u32 i = threadIdx.x; i < d.answers; i += SAMPLE_THREADS) {
        u32 token = details.tokens[d.answer + i];
        if (token < a.vocabulary) atomicAdd(&tally[token], 1u);
    }
    if (threadIdx.x == 0 && d.last != NOWHERE) {
        u32 token = a.step->tokens[d.last];
        if (token < a.vocabulary) atomicAdd(&tally[token], 1u);
    }
    __syncthreads();
}

/// Orders logits, of equals the lower id first; 0 for NaN.
__device__ __forceinline__ u64 order_of(float x, u32 id) {
    if (x != x) return 0;
    u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
    u32 size = bits >> 31 ? ~bits : bits | 1u << 31;
    return (u64)size << 32 | (u32)~id;
}

/// The largest over the block, in every thread.
__device__ __forceinline__ u64 block_highest(u64 x, SampleShared &s) {
    for (int mask = 16; mask > 0; mask /= 2) {
        u64 other = shuffle_xor_wide(x, mask);
        x = other > x ? other : x;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.masses[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < SAMPLE_THREADS / 32; ++warp) {
        x = s.masses[warp] > x ? s.masses[warp] : x;
    }
    return x;
}

/// Log-probabilities of `token` and of the `d.top` most likely tokens. Sums are 64-bit fixed point,
/// which have one value in any order.
__device__ __forceinline__ void score(const RefineArgs &a, const Detail &d, const Plain &logits,
                                      u32 token, SampleShared &s) {
    constexpr double ONE = (double)((u64)1 << 40);
    u32 *out = a.scores + (u64)d.place * SCORE_WORDS;
    float peak;
    u32 place;
    find_peak(logits, a.vocabulary, s, peak, place);
    bool finite = fabsf(peak) != INFINITY;
    u64 mass = 0;
    if (finite) {
        for_each<8>(a.vocabulary, -INFINITY, logits, [&](u32, float x) {
            if (x == x) mass += (u64)((double)expf(x - peak) * ONE);
        });
    }
    double log_sum = log((double)block_mass(mass, s) / ONE);
    auto logprob = [&](float x) {
        if (!finite) return x == INFINITY ? 0.0f : IMPOSSIBLE;
        float value = (float)((double)x - (double)peak - log_sum);
        return value > IMPOSSIBLE ? value : IMPOSSIBLE;
    };
    u32 found = 0;
    u64 before = ~(u64)0;
    for (; found < d.top; ++found) {
        u64 best = 0;
        for_each<8>(a.vocabulary, NAN, logits, [&](u32 i, float x) {
            u64 order = order_of(x, i);
            if (order < before && order > best) best = order;
        });
        before = block_highest(best, s);
        if (before == 0) break;
        if (threadIdx.x == 0) {
            u32 id = ~(u32)before;
            out[2 + 2 * found] = id;
            out[3 + 2 * found] = __float_as_uint(logprob(logits(id)));
        }
    }
    if (threadIdx.x == 0) {
        out[0] = __float_as_uint(token < a.vocabulary ? logprob(logits(token)) : IMPOSSIBLE);
        out[1] = found;
    }
}

/// A block a detail, after all draws.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
refine(const __grid_constant__ RefineArgs a) {
    begin();
    SHARED_MEMORY(shared);
    SampleShared &s = *(SampleShared *)shared;
    if (blockIdx.x >= a.details->count) return;
    Detail d = a.details->detail[blockIdx.x];
    Draw draw = a.step->draw[d.draw];
    Plain logits{a.logits, draw.row};
    u32 token = a.tokens[d.draw];
    if (d.adjusted) {
        u32 *weights = a.weights + (u64)d.draw * a.vocabulary;
        count_tokens(a, d, weights);
        Adjusted adjusted{logits, d, a.details->biases + d.bias, weights};
        if (choose(draw, adjusted, weights, a.vocabulary, s, token)) {
            s.chosen = token;
            a.tokens[d.draw] = token;
            a.seats[draw.seat] = token;
        }
        __syncthreads();
        token = s.chosen;
    }
    if (d.place != NOWHERE) score(a, d, logits, token, s);
}

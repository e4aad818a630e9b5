// What both forms of the experts' products on Hopper share: their arguments, barriers, and the end of a tile.
// Compiled by hopper.py with UP, WEIGHTED, GATED, BIAS, COPIED (x has rows in expert order), HALF (0: bfloat16, 1: float16) and
// those of the activation: KIND (index into operators.KINDS), LIMITED, CLAMP_AFTER, GATE_CAPPED, UP_CAPPED.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) TensorMap {
    u64 words[16];
};

struct Args {  // as in hopper.py
    const u16 *x;          // [T, H], GATHER only
    const u16 *bias;       // of the weight rows, BIAS only
    const float *weights;  // of the slots, WEIGHTED only
    const int *slots;      // of the rows
    const int *tiles;      // four of each tile: expert, the expert's first tile, first row, end row
    int *totals;           // tiles in all
    int *turn;             // turns taken so far, 0 at the start
    u16 *out;
    u64 stride_bias_expert, stride_bias, stride_bias_half;
    u32 stride_x_8;  // units of 16 bytes
    int top_k, most_tiles, columns, depth, width;
    float alpha, beta, limit, gate_softcap, up_softcap;
};

constexpr bool GATHER = UP && !COPIED;

__device__ u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ void wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\nbra again;\nover:\n}" ::"r"(bar), "r"(parity)
        : "memory");
}

__device__ void expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ void load_rows(u32 to, const TensorMap *map, u32 bar, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map),
        "r"(bar), "r"(k), "r"(row)
        : "memory");
}

// A matrix of 128-byte rows, swizzled as TMA does it: groups of 8 rows follow each other.
__device__ u64 descriptor(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#if HALF
#define TYPES ".f32.f16.f16 "
#else
#define TYPES ".f32.bf16.bf16 "
#endif
__device__ u32 packed(float low, float high) {
    u32 both;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ float widened(u16 bits) {
#if HALF
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return __uint_as_float(static_cast<u32>(bits) << 16);
#endif
}

// The activation, as in activation.py; selects keep NaN as NaN.
__device__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ float nonlinear(float g, const Args &args) {
    if constexpr (KIND == 0) {
        float head = GATE_CAPPED ? args.gate_softcap * tanhf(g / args.gate_softcap) : g;
        return head * sigmoid(args.alpha * g);
    } else if constexpr (KIND == 1) {
        return 0.5f * g * (1.0f + erff(g * 0.7071067811865476f));
    } else if constexpr (KIND == 2) {
        return g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
    } else {
        float positive = g < 0.0f ? 0.0f : g;
        return KIND == 3 ? positive : positive * positive;
    }
}

__device__ float activated(float g, const Args &args) {
    if (LIMITED && CLAMP_AFTER) return at_most(nonlinear(g, args), args.limit);
    return nonlinear(LIMITED ? at_most(g, args.limit) : g, args);
}

__device__ float gated_by(float y, float u, const Args &args) {
    if (LIMITED) u = -at_most(-at_most(u, args.limit), args.limit);
    if (UP_CAPPED) u = args.up_softcap * tanhf(u / args.up_softcap);
    return y * (u + args.beta);
}

// Four values of four lanes, transposed: lane q gets the q-th value of each.
__device__ __forceinline__ void transpose(u32 (&v)[4], int q) {
    for (int i = 0; i < 4; i += 2) {
        u32 got = __shfl_xor_sync(~0u, q & 1 ? v[i] : v[i + 1], 1);
        if (q & 1)
            v[i] = got;
        else
            v[i + 1] = got;
    }
    for (int i = 0; i < 2; ++i) {
        u32 got = __shfl_xor_sync(~0u, q & 2 ? v[i] : v[i + 2], 2);
        if (q & 2)
            v[i] = got;
        else
            v[i + 2] = got;
    }
}

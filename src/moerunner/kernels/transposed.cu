// The two products of the experts on Hopper, as in hopper.cu, with tokens as columns: a tile has up to MOST tokens of one expert by
// LINES rows of its weights. The matrix unit takes any multiple of 8 columns, so an expert's tokens are cut into equal tiles and
// hardly padded, and where one tile holds them its weights are read once.
//
// A block stays on its multiprocessor and takes tiles in turn, by a counter. One warp group loads through a ring of shared memory,
// GROUPS multiply two matrices of 64 weight rows each (wgmma). Of gate and up, eight rows of each follow each other there, so that
// a thread has both sums; a warp's rows are chosen so that its columns of the result lie next to each other.
//
// Compiled with MOST, and what hopper.h names.

#include "hopper.h"

constexpr bool PAIRED = UP && GATED, LOOKS_UP = !UP || WEIGHTED;
constexpr int DEPTH = 64, STAGES = 4, GROUPS = 2, LINES = 128 * GROUPS, WIDTH = PAIRED ? LINES / 2 : LINES, BOX = 32;
constexpr u32 W_BYTES = LINES * DEPTH * 2, X_BYTES = MOST * DEPTH * 2, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u32 FULL = STAGES * STAGE_BYTES, EMPTY = FULL + 8 * STAGES, POSTED = EMPTY + 8 * STAGES, READ = POSTED + 16;
constexpr u32 POSTS = READ + 16, LOOKED_UP = POSTS + 32;  // then of each group MOST slots and MOST weights

__device__ void arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }

__device__ void load_weights(u32 to, const TensorMap *map, u32 bar, int k, int eighth, int expert) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(bar), "r"(k), "r"(0), "r"(eighth), "r"(expert)
        : "memory");
}

// Eight registers of sums by number, and by place.
#define R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define R6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define R7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define R8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define R9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define OUT8(i) OUT4(i), OUT4(i + 4)
#define OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NEW8(i) NEW4(i), NEW4(i + 4)
#define NEW4(i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define TO2(E) E(0), E(8)
#define TO4(E) TO2(E), E(16), E(24)
#define TO6(E) TO4(E), E(32), E(40)
#define TO7(E) TO6(E), E(48)
#define TO8(E) TO7(E), E(56)
#define TO9(E) TO8(E), E(64)
#define TO10(E) TO9(E), E(72)
#define TEXT(COLUMNS, REGISTERS, A, B, ADD)                                                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16" TYPES "{" REGISTERS       \
    "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"
#define PRODUCT(COLUMNS, REGISTERS, A, B, TO)                                                                                 \
    if constexpr (N == COLUMNS && FIRST) asm volatile(TEXT(COLUMNS, REGISTERS, A, B, 0) : TO(NEW8) : "l"(a), "l"(b));             \
    if constexpr (N == COLUMNS && !FIRST) asm volatile(TEXT(COLUMNS, REGISTERS, A, B, 1) : TO(OUT8) : "l"(a), "l"(b));

// The first of a tile defines its sums: registers that were read there would bind the code of one N to that of another.
template <int N, bool FIRST> __device__ __forceinline__ void multiply(float (&d)[N / 2], u64 a, u64 b) {
    PRODUCT(32, R0 R1, 16, 17, TO2)
    PRODUCT(64, R0 R1 R2 R3, 32, 33, TO4)
    PRODUCT(96, R0 R1 R2 R3 R4 R5, 48, 49, TO6)
    PRODUCT(112, R0 R1 R2 R3 R4 R5 R6, 56, 57, TO7)
    PRODUCT(128, R0 R1 R2 R3 R4 R5 R6 R7, 64, 65, TO8)
    PRODUCT(144, R0 R1 R2 R3 R4 R5 R6 R7 R8, 72, 73, TO9)
    PRODUCT(160, R0 R1 R2 R3 R4 R5 R6 R7 R8 R9, 80, 81, TO10)
}

__device__ u32 turned(u32 v) {  // a matrix of 8 x 8 halves that a warp holds, transposed
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

struct Tile {  // expert: -1 where there is nothing more
    int expert, row, end, column;
};

// The loader hands out tiles; the loads of the map are spread over the loop that loads a tile.
struct Turns {
    int item, total, expert, first, start, end;

    __device__ void draw(const Args &args) { item = atomicAdd(args.turn, 1); }

    __device__ void look_up(const Args &args) {
        int at = min(item / args.columns, args.most_tiles - 1);
        expert = args.tiles[at], first = args.tiles[at + args.most_tiles];
        start = args.tiles[at + 2 * args.most_tiles], end = args.tiles[at + 3 * args.most_tiles];
    }

    __device__ Tile tile(const Args &args) const {
        int place = item - first * args.columns, rows = end - start, parts = (rows + MOST - 1) / MOST;
        int size = ((rows + parts - 1) / parts + 7) / 8 * 8, top = start + place % parts * size;
        return {expert, top, min(end, top + size), place / parts};
    }

    __device__ void post(const Args &args, u32 posts, u32 posted) {
        Tile t{-1, 0, 0, 0};
        while (item < total) {
            t = tile(args);
            if (t.row < t.end) break;
            draw(args), look_up(args);
            t.expert = -1;
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(posts), "r"(t.expert), "r"(t.row), "r"(t.end), "r"(t.column)
                     : "memory");
        arrive(posted);
    }
};

__device__ Tile next_tile(int turn, u32 ring) {
    u32 slot = turn & 1;
    Tile tile;
    wait(ring + POSTED + 8 * slot, (turn >> 1) & 1);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.expert), "=r"(tile.row), "=r"(tile.end), "=r"(tile.column)
                 : "r"(ring + POSTS + 16 * slot)
                 : "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(ring + READ + 8 * slot);
    return tile;
}

__device__ __forceinline__ void load(const TensorMap &w_map, const TensorMap &x_map, const Args &args, u32 ring) {
    u32 count = 0;
    int thread = threadIdx.x, chunk = thread % 8, line = thread / 8;
    Turns turns{};
    if (thread == 0) {
        turns.total = args.totals[0] * args.columns;
        turns.draw(args);
        turns.look_up(args);
        turns.post(args, ring + POSTS, ring + POSTED);
    }
    for (int turn = 0;; ++turn) {
        Tile tile = next_tile(turn, ring);
        if (tile.expert < 0) break;
        const u16 *from = args.x + chunk * 8;
        int rows = tile.end - tile.row;
        u32 token[MOST / 16];  // where a token's row begins, in units of 16 bytes
        if (GATHER) {
#pragma unroll
            for (int i = 0; i < MOST / 16; ++i) {
                int row = line + 16 * i;
                token[i] = row < rows ? args.slots[tile.row + row] / args.top_k * args.stride_x_8 : 0;
            }
        }
        int middle = args.depth / 2, boxes = (rows + BOX - 1) / BOX;
        bool drawn = false, looked_up = false;
        for (int k = 0; k < args.depth; k += DEPTH, ++count) {
            u32 stage = count % STAGES, w = ring + stage * STAGE_BYTES, x = w + W_BYTES, bar = ring + FULL + 8 * stage;
            wait(ring + EMPTY + 8 * stage, ((count / STAGES) & 1) ^ 1);
            if (thread == 0) {
                expect(bar, W_BYTES + (GATHER ? 0 : boxes * BOX * 128));
#pragma unroll
                for (int i = 0; i < 2 * GROUPS; ++i)
                    load_weights(w + i * 8192, &w_map, bar, k, tile.column * 8 * GROUPS + i / 2 * 8 + i % 2, tile.expert);
                if (!GATHER)
                    for (int b = 0; b < boxes; ++b) load_rows(x + b * BOX * 128, &x_map, bar, k, tile.row + b * BOX);
            }
            if (GATHER) {
                u32 to = x + line * 128 + ((chunk ^ (line & 7)) << 4), bytes = k + chunk * 8 < args.depth ? 16 : 0;
                const u16 *base = bytes ? from : args.x;
#pragma unroll
                for (int i = 0; i < MOST / 16; ++i) {
                    if (i * 16 < rows)
                        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + i * 2048),
                                     "l"(base + static_cast<u64>(token[i]) * 8), "r"(bytes)
                                     : "memory");
                }
                from += DEPTH;
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
            }
            if (thread == 0 && !drawn) {
                turns.draw(args);
                drawn = true;
            } else if (thread == 0 && !looked_up && k >= middle) {
                turns.look_up(args);
                looked_up = true;
            }
        }
        if (thread == 0) {
            if (!looked_up) turns.look_up(args);
            u32 slot = (turn + 1) & 1;
            wait(ring + READ + 8 * slot, (((turn + 1) >> 1) & 1) ^ 1);
            turns.post(args, ring + POSTS + 16 * slot, ring + POSTED + 8 * slot);
        }
    }
}

// The products of one stage, under way.
template <int N, bool FIRST>
__device__ __forceinline__ void stage(float (&d)[2][N / 2], u32 ring, int group, u32 count) {
    u32 at = count % STAGES, w = ring + at * STAGE_BYTES;
    wait(ring + FULL + 8 * at, (count / STAGES) & 1);
    if (GATHER) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    u64 of_w = descriptor(w + group * 2 * 8192), of_x = descriptor(w + W_BYTES);
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            u64 a = of_w + 512 * m + 2 * step, b = of_x + 2 * step;
            if (FIRST && step == 0)
                multiply<N, true>(d[m], a, b);
            else
                multiply<N, false>(d[m], a, b);
        }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// A group's part of a tile, with N columns for its tokens.
template <int N> __device__ __forceinline__ void part(const Tile &tile, const Args &args, u32 ring, int group, u32 &count) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, q = lane % 4, rows = tile.end - tile.row;
    u32 slots = ring + LOOKED_UP + group * MOST * 8, weights = slots + MOST * 4;
    auto together = [&] { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); };
    if (LOOKS_UP) {
        together();  // the tile before is written
        for (int i = thread; i < rows; i += 128) {
            int slot = args.slots[tile.row + i];
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(slots + 4 * i), "r"(slot) : "memory");
            if (WEIGHTED) asm volatile("st.shared.f32 [%0], %1;" ::"r"(weights + 4 * i), "f"(args.weights[slot]) : "memory");
        }
    }
    float d[2][N / 2];
    stage<N, true>(d, ring, group, count++);
    for (int k = DEPTH; k < args.depth; k += DEPTH) {
        stage<N, false>(d, ring, group, count++);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (lane == 0) arrive(ring + EMPTY + 8 * ((count - 2) % STAGES));
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (lane == 0) arrive(ring + EMPTY + 8 * ((count - 1) % STAGES));
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(d[m][i])::"memory");
    if (LOOKS_UP) together();

    // A warp has WIDTH / GROUPS / 4 columns next to each other: each eighth of a matrix is eight columns of weights by eight tokens.
    int column = (tile.column * GROUPS + group) * (WIDTH / GROUPS) + warp * (WIDTH / GROUPS / 4);
    float bias[2][2] = {};
    if constexpr (BIAS) {
        const u16 *from = args.bias + tile.expert * args.stride_bias_expert;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int at = column + lane / 4 + (PAIRED ? 8 * m : 16 * m + 8 * i);
                if (at < args.width) bias[m][i] = widened(from[at * args.stride_bias + (PAIRED ? i * args.stride_bias_half : 0)]);
            }
    }
    constexpr int AT_ONCE = PAIRED ? 2 : 1;  // eights of tokens, so that a lane has 16 bytes to store
#pragma unroll
    for (int j = 0; j < N / 8; j += AT_ONCE) {
        u32 v[4];
#pragma unroll
        for (int t = 0; t < AT_ONCE; ++t) {
            int eight = j + t;
            float weight[2] = {1.0f, 1.0f};
            if (WEIGHTED)
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(weight[0]), "=f"(weight[1]) : "r"(weights + 32 * eight + 8 * q));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                float y[2][2];  // by half and token
#pragma unroll
                for (int c = 0; c < 2; ++c) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float sum = d[m][4 * eight + 2 * i + c];
                        if (UP && WEIGHTED) sum *= weight[c];
                        if (BIAS) sum += bias[m][i];
                        if (!UP && WEIGHTED) sum *= weight[c];
                        y[i][c] = sum;
                    }
                    if constexpr (PAIRED) {
                        y[0][c] = gated_by(activated(y[0][c], args), y[1][c], args);
                    } else if constexpr (UP) {
                        y[0][c] = activated(y[0][c], args), y[1][c] = activated(y[1][c], args);
                    }
                }
                if constexpr (PAIRED) {
                    v[2 * t + m] = turned(packed(y[0][0], y[0][1]));
                } else {
                    v[2 * m] = turned(packed(y[0][0], y[0][1]));
                    v[2 * m + 1] = turned(packed(y[1][0], y[1][1]));
                }
            }
        }
        transpose(v, q);
        int token = (PAIRED ? j + q / 2 : j) * 8 + lane / 4, at = column + (PAIRED ? q % 2 : q) * 8, row = tile.row + token;
        if (!UP) asm volatile("ld.shared.b32 %0, [%1];" : "=r"(row) : "r"(slots + 4 * token));
        if (token < rows && at < args.width)
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(args.out + static_cast<u64>(row) * args.width + at),
                         "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                         : "memory");
    }
}

__device__ __forceinline__ void multiply_all(const Args &args, u32 ring, int group) {
    u32 count = 0;
    for (int turn = 0;; ++turn) {
        Tile tile = next_tile(turn, ring);
        if (tile.expert < 0) break;
        int rows = tile.end - tile.row;
        if (rows <= 32) part<32>(tile, args, ring, group, count);
        else if (rows <= 64) part<64>(tile, args, ring, group, count);
        else if (rows <= 96) part<96>(tile, args, ring, group, count);
        else if (rows <= 112) part<112>(tile, args, ring, group, count);
        else if (rows <= 128) part<128>(tile, args, ring, group, count);
        else if (rows <= 144) part<144>(tile, args, ring, group, count);
        else part<160>(tile, args, ring, group, count);
    }
}

extern "C" __global__ void __launch_bounds__(128 + 128 * GROUPS, 1)
    grouped_product(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
                    const __grid_constant__ Args args) {
    extern __shared__ unsigned char memory[];
    u32 ring = (shared_address(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(ring + FULL + 8 * i, GATHER ? 129 : 1);  // the loader's threads, and the copies' bytes
            barrier_init(ring + EMPTY + 8 * i, 4 * GROUPS);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(ring + POSTED + 8 * i, 1);
            barrier_init(ring + READ + 8 * i, 4 * GROUPS + 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(72));
        load(w_map, x_map, args, ring);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(216));
        multiply_all(args, ring, threadIdx.x / 128 - 1);
    }
}

// The two products of the experts on Hopper: h[r] = act(x[token of r] w13[e]^T + b13[e]) where UP, else
// y[slot of r] = (h[r] w2[e]^T + b2[e]) * weight, over rows in expert order (see order.py).
//
// Clusters of two blocks stay on their multiprocessors and take tiles in turn, by a counter. A block's tile has 64 * PARTS rows
// and COLUMNS weight rows. Where an expert has more rows left than one tile holds, both blocks take the same weight rows, each
// loads half of them and multicasts it to both; else both take the same rows, and weight rows next to each other. Within a
// block one warp group loads through a ring of shared memory, PARTS multiply 64 rows each (wgmma).
//
// Compiled with PARTS and COLUMNS (2 and 256, or 3 and 192), and what hopper.h names.

#include "hopper.h"

constexpr int ROWS = 64 * PARTS, DEPTH = 64, STAGES = 4, WIDTH = UP && GATED ? COLUMNS / 2 : COLUMNS;
constexpr u32 PART_BYTES = 64 * DEPTH * 2, A_BYTES = PARTS * PART_BYTES, W_BYTES = COLUMNS * DEPTH * 2;
constexpr u32 STAGE_BYTES = A_BYTES + W_BYTES;
constexpr u32 BARRIERS = STAGES * STAGE_BYTES;  // full, empty, posted, read; then the two posts of 16 bytes

__device__ u32 rank_in_cluster() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ u32 in_block(u32 address, u32 block) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ void arrive_remote(u32 bar_in_cluster) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar_in_cluster) : "memory");
}

__device__ void load_box(u32 to, const TensorMap *map, u32 bar, int k, int row, int half, int expert) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(bar), "r"(k), "r"(row), "r"(half), "r"(expert)
        : "memory");
}

__device__ void load_box_for_both(u32 to, const TensorMap *map, u32 bar, int k, int row, int half, int expert) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, "
        "%6}], [%2], %7;" ::"r"(to),
        "l"(map), "r"(bar), "r"(k), "r"(row), "r"(half), "r"(expert), "h"(static_cast<u16>(3))
        : "memory");
}

#define OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT16(i) OUT4(i), OUT4(i + 4), OUT4(i + 8), OUT4(i + 12)

__device__ __forceinline__ void multiply(float (&d)[COLUMNS / 2], u64 a, u64 w, int add) {
#if COLUMNS == 256
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16" TYPES "{"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, p, 1, 1, 0, 0;\n}"
        : OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80), OUT16(96), OUT16(112)
        : "l"(a), "l"(w), "r"(add));
#else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\nwgmma.mma_async.sync.aligned.m64n192k16" TYPES "{"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
        "}, %96, %97, p, 1, 1, 0, 0;\n}"
        : OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80)
        : "l"(a), "l"(w), "r"(add));
#endif
}

// A block's tile. expert: -1 where there is nothing more.
struct Tile {
    int expert, row, end, column;
};

// What the two blocks do in their `item`-th turn, from the map of tiles. False: nothing.
__device__ bool tiles_of(int item, int expert, int first, int start, int end, const Args &args, Tile (&tile)[2]) {
    int columns = args.columns + (args.columns & 1), half = columns / 2;
    int place = item - first * columns, group = place / (8 * columns) * 8, within = place % (8 * columns);
    int size = max(min((end - start + 2 * ROWS - 1) / (2 * ROWS) - group, 8), 1);
    int row = start + (group + within % size) * 2 * ROWS, n = within / size, rows = end - row;
    bool pair = rows > ROWS;
    if (n >= (pair ? args.columns : half)) return false;
    int first_half = (min(rows, 2 * ROWS) + 127) / 128 * 64;
    for (int r = 0; r < 2; ++r) {
        int top = row + (pair ? r * first_half : 0), column = pair ? n : 2 * n + r;
        int bottom = column < args.columns ? min(end, row + (pair && r == 0 ? first_half : 2 * ROWS)) : top;
        tile[r] = {expert, top, bottom, pair ? n | 1 << 30 : column};
    }
    return true;
}

// The loader of the first block hands out tiles; the loads of the map are spread over the loop that loads a tile.
struct Turns {
    int item, total, expert, first, start, end;

    __device__ void draw(const Args &args) { item = atomicAdd(args.turn, 1); }

    __device__ void look_up(const Args &args) {
        int columns = args.columns + (args.columns & 1), at = min(item / columns, args.most_tiles - 1);
        expert = args.tiles[at], first = args.tiles[at + args.most_tiles];
        start = args.tiles[at + 2 * args.most_tiles], end = args.tiles[at + 3 * args.most_tiles];
    }

    // Writes the tile at hand, or the next that is one, into both blocks.
    __device__ void post(const Args &args, u32 posts, u32 posted) {
        Tile tile[2];
        while (item < total && !tiles_of(item, expert, first, start, end, args, tile)) draw(args), look_up(args);
        if (item >= total) tile[0].expert = tile[1].expert = -1;
        for (u32 r = 0; r < 2; ++r) {
            asm volatile(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                    in_block(posts, r)),
                "r"(tile[r].expert), "r"(tile[r].row), "r"(tile[r].end), "r"(tile[r].column), "r"(in_block(posted, r))
                : "memory");
        }
    }
};

// Waits for the tile of this turn and says that it was read. One thread of a block also makes room for the next post.
__device__ Tile next_tile(int turn, u32 posts, u32 posted, u32 read) {
    u32 slot = turn & 1;
    Tile tile;
    wait(posted + 8 * slot, (turn >> 1) & 1);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.expert), "=r"(tile.row), "=r"(tile.end), "=r"(tile.column)
                 : "r"(posts + 16 * slot)
                 : "memory");
    if (threadIdx.x == 0) expect(posted + 8 * slot, 16);
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_remote(in_block(read + 8 * slot, 0));
    return tile;
}

__device__ __forceinline__ void load(const TensorMap &w_map, const TensorMap &a_map, const Args &args, u32 ring) {
    u32 full = ring + BARRIERS, empty = full + 8 * STAGES, posted = empty + 8 * STAGES, read = posted + 16, posts = read + 16;
    u32 rank = rank_in_cluster(), count = 0;
    int thread = threadIdx.x, chunk = thread % 8, line = thread / 8;
    bool leads = rank == 0 && thread == 0;
    Turns turns{};
    if (leads) {
        turns.total = args.totals[0] * (args.columns + (args.columns & 1));
        turns.draw(args);
        turns.look_up(args);
        turns.post(args, posts, posted);
    }
    for (int turn = 0;; ++turn) {
        Tile tile = next_tile(turn, posts, posted, read);
        if (tile.expert < 0) break;
        bool pair = tile.column >> 30;
        int n = tile.column & ~(1 << 30);
        const u16 *from = args.x + chunk * 8;
        u32 token[ROWS / 16], live = 0;  // where a token's row begins, in units of 16 bytes
        if (GATHER) {
            for (int i = 0; i < ROWS / 16; ++i) {
                int row = tile.row + line + 16 * i;
                int slot = row < tile.end ? args.slots[row] : 0;
                live |= (row < tile.end) << i;
                token[i] = slot / args.top_k * args.stride_x_8;
            }
        }
        int parts = min((tile.end - tile.row + 63) / 64, PARTS), middle = args.depth / 2;
        bool drawn = false, looked_up = false;
        for (int k = 0; k < args.depth; k += DEPTH, ++count) {
            u32 stage = count % STAGES, a = ring + stage * STAGE_BYTES, w = a + A_BYTES, bar = full + 8 * stage;
            wait(empty + 8 * stage, ((count / STAGES) & 1) ^ 1);
            if (thread == 0) {
                expect(bar, W_BYTES + (GATHER ? 0 : parts * PART_BYTES));
                if (!GATHER)
                    for (int p = 0; p < parts; ++p) load_rows(a + p * PART_BYTES, &a_map, bar, k, tile.row + p * 64);
                if (pair) {
                    int row = n * WIDTH + (GATED && UP ? 0 : rank * (COLUMNS / 2)), half = GATED && UP ? rank : 0;
                    load_box_for_both(w + rank * (W_BYTES / 2), &w_map, bar, k, row, half, tile.expert);
                } else {
                    for (int h = 0; h < 2; ++h) {
                        int row = n * WIDTH + (GATED && UP ? 0 : h * (COLUMNS / 2)), half = GATED && UP ? h : 0;
                        load_box(w + h * (W_BYTES / 2), &w_map, bar, k, row, half, tile.expert);
                    }
                }
            }
            if (GATHER) {
                u32 to = a + line * 128 + ((chunk ^ (line & 7)) << 4);
                bool inside = k + chunk * 8 < args.depth;
                for (int i = 0; i < ROWS / 16; ++i) {
                    bool whole = inside && (live >> i & 1);  // else zeros, from an address that is one
                    const u16 *at = whole ? from + static_cast<u64>(token[i]) * 8 : args.x;
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + i * 2048), "l"(at), "r"(whole ? 16 : 0)
                                 : "memory");
                }
                from += DEPTH;
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
            }
            if (leads && !drawn) {
                turns.draw(args);
                drawn = true;
            } else if (leads && !looked_up && k >= middle) {
                turns.look_up(args);
                looked_up = true;
            }
        }
        if (leads) {
            if (!looked_up) turns.look_up(args);
            u32 slot = (turn + 1) & 1;
            wait(read + 8 * slot, (((turn + 1) >> 1) & 1) ^ 1);
            turns.post(args, posts + 16 * slot, posted + 8 * slot);
        }
    }
}

__device__ __forceinline__ void multiply_all(const Args &args, u32 ring, int part) {
    u32 full = ring + BARRIERS, empty = full + 8 * STAGES, posted = empty + 8 * STAGES, read = posted + 16, posts = read + 16;
    int thread = threadIdx.x % 128, lane = thread % 32, q = lane % 4;
    u32 count = 0;
    u32 empty_there = in_block(empty, lane & 1);
    auto release = [&](u32 stage) {
        if (lane < 2) arrive_remote(empty_there + 8 * stage);
    };
    float d[COLUMNS / 2];
    for (int turn = 0;; ++turn) {
        Tile tile = next_tile(turn, posts, posted, read);
        if (tile.expert < 0) break;
        int n = tile.column & ~(1 << 30);
        int top = tile.row + part * 64;
        if (top >= tile.end) {
            for (int k = 0; k < args.depth; k += DEPTH, ++count) {
                wait(full + 8 * (count % STAGES), (count / STAGES) & 1);
                release(count % STAGES);
            }
            continue;
        }
        int row = top + thread / 32 * 16 + lane / 4;  // and the eighth after it
        int place[2] = {row, row + 8};
        float weight[2] = {1.0f, 1.0f};
        if (WEIGHTED || !UP) {
            for (int i = 0; i < 2; ++i) {
                int slot = row + 8 * i < tile.end ? args.slots[row + 8 * i] : 0;
                if (!UP) place[i] = slot;
                if (WEIGHTED) weight[i] = args.weights[slot];
            }
        }
        for (int k = 0; k < args.depth; k += DEPTH, ++count) {
            u32 stage = count % STAGES, a = ring + stage * STAGE_BYTES, w = a + A_BYTES;
            wait(full + 8 * stage, (count / STAGES) & 1);
            if (GATHER) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            u64 da = descriptor(a + part * PART_BYTES), dw = descriptor(w);
#pragma unroll
            for (int step = 0; step < 4; ++step) multiply(d, da + 2 * step, dw + 2 * step, k > 0 || step > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (k > 0) release((count - 1) % STAGES);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release((count - 1) % STAGES);
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");

        const u16 *bias = BIAS ? args.bias + tile.expert * args.stride_bias_expert : nullptr;
        auto bias_of = [&](int column, int half) {
            return column < args.width ? widened(bias[column * args.stride_bias + half * args.stride_bias_half]) : 0.0f;
        };
#pragma unroll
        for (int group = 0; group < WIDTH / 32; ++group) {
            float of_gate[8], of_up[8];  // biases of this thread's columns
            if constexpr (BIAS) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    int column = n * WIDTH + (group * 4 + j / 2) * 8 + 2 * q + j % 2;
                    of_gate[j] = bias_of(column, 0);
                    if (UP && GATED) of_up[j] = bias_of(column, 1);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 v[4];
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    float y[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        int at = (group * 4 + b) * 4 + i * 2 + j;
                        if constexpr (UP) {
                            float g = WEIGHTED ? d[at] * weight[i] : d[at];
                            if (BIAS) g += of_gate[2 * b + j];
                            y[j] = activated(g, args);
                            if constexpr (GATED) {
                                float u = WEIGHTED ? d[at + COLUMNS / 4] * weight[i] : d[at + COLUMNS / 4];
                                if (BIAS) u += of_up[2 * b + j];
                                y[j] = gated_by(y[j], u, args);
                            }
                        } else {
                            y[j] = d[at];
                            if (BIAS) y[j] += of_gate[2 * b + j];
                            if (WEIGHTED) y[j] *= weight[i];
                        }
                    }
                    v[b] = packed(y[0], y[1]);
                }
                transpose(v, q);
                int column = n * WIDTH + group * 32 + q * 8;
                if (row + 8 * i < tile.end && column < args.width) {
                    u16 *to = args.out + static_cast<u64>(place[i]) * args.width + column;
                    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                                 : "memory");
                }
            }
        }
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128 + 128 * PARTS, 1)
    grouped_product(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap a_map,
                    const __grid_constant__ Args args) {
    extern __shared__ unsigned char memory[];
    u32 ring = (shared_address(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        u32 bar = ring + BARRIERS;
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(bar + 8 * i, GATHER ? 129 : 1);       // the loader's threads, and the copies' bytes
            barrier_init(bar + 8 * (STAGES + i), 8 * PARTS);      // the multiplying warps of both blocks
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(bar + 8 * (2 * STAGES + i), 1);       // the leader posts 16 bytes
            barrier_init(bar + 8 * (2 * STAGES + 2 + i), 8 * PARTS + 8);  // all warps of both blocks read
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < 2; ++i) expect(bar + 8 * (2 * STAGES + i), 16);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PARTS == 2 ? 72 : 80));
        load(w_map, a_map, args, ring);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(PARTS == 2 ? 216 : 144));
        multiply_all(args, ring, threadIdx.x / 128 - 1);
    }
    // A block's memory is written to by the other until both are done.
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

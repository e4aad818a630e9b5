// Sorting token slots by expert, as order.py describes it, for more slots than one program compares: blocks of 1,024 slots count
// their experts, then each places its slots behind those of the blocks before. Compiled with ID, the integer type of the ids.

typedef unsigned short u16;
constexpr int BLOCK = 1024, WARPS = BLOCK / 32;

// Slots without an expert, and places behind the last slot, have key E.
__device__ int key_of(const ID *ids, int at, int slots, int experts) {
    if (at >= slots) return experts;
    ID id = ids[at];
    return id < 0 || id >= experts ? experts : static_cast<int>(id);
}

extern "C" __global__ void __launch_bounds__(BLOCK) count_experts(const ID *ids, int *counts, int slots, int experts) {
    extern __shared__ int count[];  // [E + 1]
    for (int e = threadIdx.x; e <= experts; e += BLOCK) count[e] = 0;
    __syncthreads();
    int key = key_of(ids, blockIdx.x * BLOCK + threadIdx.x, slots, experts);
    unsigned same = __match_any_sync(~0u, key);
    if ((same & ((1u << threadIdx.x % 32) - 1)) == 0) atomicAdd(count + key, __popc(same));
    __syncthreads();
    for (int e = threadIdx.x; e <= experts; e += BLOCK) counts[blockIdx.x * (experts + 1) + e] = count[e];
}

// What all threads before this one hold, and the sum of all; for a whole block.
__device__ int sum_before(int value, int *scratch, int &total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
    }
    return before + sum - value;
}

// Block `blocks` writes the map of tiles, each other places its slots. experts < BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) place_slots(const ID *ids, const int *counts, int *rows, int *tiles,
                                                                int slots, int experts, int most_tiles, int block_m) {
    extern __shared__ int memory[];
    int keys = experts + 1, blocks = gridDim.x - 1, block = blockIdx.x, thread = threadIdx.x;
    int *total = memory, *before = total + keys, *scratch = before + keys;  // [E + 1], [E + 1], [WARPS]
    for (int e = thread; e < 2 * keys; e += BLOCK) memory[e] = 0;
    __syncthreads();
    int parts = BLOCK / keys, part = thread / keys, e = thread % keys;
    if (part < parts) {
        int all = 0, earlier = 0;
#pragma unroll 8
        for (int b = part; b < blocks; b += parts) {
            int n = counts[b * keys + e];
            all += n;
            earlier += b < block ? n : 0;
        }
        atomicAdd(total + e, all);
        atomicAdd(before + e, earlier);
    }
    __syncthreads();
    int mine = thread < keys ? total[thread] : 0, sum, start = sum_before(mine, scratch, sum);

    if (block == blocks) {
        int count = thread < experts ? (mine + block_m - 1) / block_m : 0, all, first = sum_before(count, scratch, all);
        __syncthreads();
        if (thread < keys) total[thread] = first, before[thread] = start;  // total[E]: tiles in all
        __syncthreads();
        for (int t = thread; t < most_tiles; t += BLOCK) {
            int low = 0, high = experts;  // the last expert whose first tile is not behind t
            while (low + 1 < high) {
                int middle = (low + high) / 2;
                if (total[middle] <= t)
                    low = middle;
                else
                    high = middle;
            }
            tiles[t] = t < all ? low : -1;
            tiles[t + most_tiles] = total[low];
            tiles[t + 2 * most_tiles] = before[low];
            tiles[t + 3 * most_tiles] = before[low + 1];
        }
        if (thread < 4) tiles[4 * most_tiles + thread] = thread == 0 ? all : 0;
        return;
    }
    if (thread < keys) total[thread] = start + before[thread];  // where this block's slots of each expert begin
    u16 *of_warp = reinterpret_cast<u16 *>(scratch + WARPS);    // [WARPS, E + 1]: how many the warps before have
    for (int i = thread; i < WARPS * keys; i += BLOCK) of_warp[i] = 0;
    __syncthreads();
    int at = block * BLOCK + thread, key = key_of(ids, at, slots, experts), warp = thread / 32;
    unsigned same = __match_any_sync(~0u, key), below = same & ((1u << thread % 32) - 1);
    if (below == 0) of_warp[warp * keys + key] = __popc(same);
    __syncthreads();
    if (thread < keys) {
        int sum = 0;
        for (int w = 0; w < WARPS; ++w) {
            int n = of_warp[w * keys + thread];
            of_warp[w * keys + thread] = sum;
            sum += n;
        }
    }
    __syncthreads();
    if (at < slots) rows[total[key] + of_warp[warp * keys + key] + __popc(below)] = at;
}

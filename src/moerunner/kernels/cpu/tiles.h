// Products of many tokens by AMX: 32 tokens with 32 rows of weights at a time, in tiles of 16 rows of 64 bytes.
//
// Tokens lie as they are arranged for pairs of bfloat16. Weights are packed, so that a tile holds a pair of numbers of each of 16
// rows, below it the next pair. AMX sums in an order of its own. EMULATED has the same tiles as arrays.

#pragma once

#include "dots.h"

#if defined(__AMX_BF16__) && !defined(TILES)
#define TILES
#endif

namespace {

constexpr long SIDE = 16;                // rows of a tile, and words of each
constexpr long TILE = 2 * SIDE * SIDE;   // numbers of a tile
constexpr long TILE_ROWS = 2 * SIDE;     // of weights in a panel

#ifdef TILES

static_assert(LANES == SIDE, "a row of a tile is one vector");

#ifndef EMULATED

#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_zero _tile_zero
#define tile_product _tile_dpbf16ps

// The calling thread's tiles for the time of a call; those of whoever had them before come back.
class TileSetup {
   public:
    TileSetup() {
        _tile_storeconfig(before_);
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = SIDE;
        _tile_loadconfig(config);
    }
    ~TileSetup() { _tile_loadconfig(before_); }

   private:
    alignas(64) uint8_t before_[64];
};

#else

thread_local uint32_t tiles[8][SIDE][SIDE];

inline void tile_load(int tile, const void* from, long step) {
    for (long i = 0; i < SIDE; ++i) memcpy(tiles[tile][i], (const char*)from + i * step, 64);
}
inline void tile_store(int tile, void* to, long step) {
    for (long i = 0; i < SIDE; ++i) memcpy((char*)to + i * step, tiles[tile][i], 64);
}
inline void tile_zero(int tile) { memset(tiles[tile], 0, sizeof tiles[tile]); }
inline void tile_product(int sum, int a, int b) {
    for (long i = 0; i < SIDE; ++i) {
        vf row = load<vf>(tiles[sum][i]);
        for (long k = 0; k < SIDE; ++k) row = dot_pairs(row, tiles[a][i][k] + (vu){}, load<vu>(tiles[b][k]));
        store(tiles[sum][i], row);
    }
}

struct TileSetup {};

#endif

// Of lane l when the blocks beside the diagonal change places, in the vector above and in the one S below it.
template <int S>
constexpr int above(int l) { return l & S ? LANES + l - S : l; }
template <int S>
constexpr int below(int l) { return l & S ? LANES + l : l + S; }

template <int S>
INLINE void swap_blocks(vf* v) {
    for (int i = 0; i < SIDE; ++i) {
        if (i & S) continue;
        const vf a = v[i], b = v[i + S];
        v[i] = pick<above<S>>(a, b), v[i + S] = pick<below<S>>(a, b);
    }
}

// Up to TILE_ROWS rows of weights into a panel of [steps of 32 numbers][2 tiles], completed with zeros.
static void pack_tiles(uint16_t* panel, const uint16_t* w, long step, long column, long rows, long width) {
    for (long k = 0; k < width; k += 2 * SIDE) {
        for (long first = 0; first < TILE_ROWS; first += SIDE, panel += TILE) {
            vf v[SIDE];
            for (long r = 0; r < SIDE; ++r) {
                const uint16_t* from = w + (first + r) * step + k * column;
                uint16_t some[2 * SIDE] = {};
                if (first + r < rows && column == 1 && k + 2 * SIDE <= width)
                    memcpy(some, from, sizeof some);
                else if (first + r < rows)
                    for (long i = 0; i < 2 * SIDE && k + i < width; ++i) some[i] = from[i * column];
                v[r] = load<vf>(some);
            }
            swap_blocks<8>(v), swap_blocks<4>(v), swap_blocks<2>(v), swap_blocks<1>(v);
            for (long r = 0; r < SIDE; ++r) store(panel + 2 * SIDE * r, v[r]);
        }
    }
}

// One panel with `tokens` rows of x: whole tiles of 16 are read, and written to out [.][pitch], TILE_ROWS numbers each.
static void multiply_tiles(const uint16_t* panel, long width, const uint16_t* x, long x_step, long tokens, float* out, long pitch) {
    const long steps = (width + 2 * SIDE - 1) / (2 * SIDE), x_bytes = 2 * x_step, bytes = 4 * pitch;
    for (long t = 0; t < tokens; t += 2 * SIDE) {
        const bool two = t + SIDE < tokens;
        const uint16_t *first = x + t * x_step, *second = first + SIDE * x_step;
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        for (long s = 0; s < steps; ++s) {
            tile_load(4, first + s * 2 * SIDE, x_bytes);
            tile_load(6, panel + 2 * s * TILE, 64);
            tile_load(7, panel + (2 * s + 1) * TILE, 64);
            tile_product(0, 4, 6);
            tile_product(1, 4, 7);
            if (two) {
                tile_load(5, second + s * 2 * SIDE, x_bytes);
                tile_product(2, 5, 6);
                tile_product(3, 5, 7);
            }
        }
        tile_store(0, out + t * pitch, bytes);
        tile_store(1, out + t * pitch + SIDE, bytes);
        if (two) {
            tile_store(2, out + (t + SIDE) * pitch, bytes);
            tile_store(3, out + (t + SIDE) * pitch + SIDE, bytes);
        }
    }
}

#endif

}  // namespace

// Products of many tokens in float32: outer products of PANEL rows of weights with SQUAD tokens at a time, whose sums fill the
// registers. Weights are packed for it, one panel after the other: PANEL numbers for each number of a token. A sum runs along the
// tokens, so it is another one than that of dots.h.

#pragma once

#include "dots.h"

namespace {

constexpr long PANEL = 2 * LANES;
constexpr int SQUAD = LANES == 16 ? 12 : 6;
constexpr long PIECE = 128;           // numbers of a row that are packed at a time
constexpr long SLICE = 4096 / PANEL;  // numbers of a token at a time: 16 KiB of a panel, which stay in the first cache

// Four rows, LANES numbers of each, turned: for each of these numbers the four, PANEL apart.
INLINE void put_turned(float* panel, const vf* rows) {
    const vf a = pick<low_1>(rows[0], rows[1]), b = pick<high_1>(rows[0], rows[1]);
    const vf c = pick<low_1>(rows[2], rows[3]), d = pick<high_1>(rows[2], rows[3]);
    const vf turned[4] = {pick<low_2>(a, c), pick<high_2>(a, c), pick<low_2>(b, d), pick<high_2>(b, d)};
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < LANES / 4; ++i) memcpy(panel + (4 * i + j) * PANEL, (const float*)&turned[j] + 4 * i, 16);
}

// A step of four rows.
template <class K>
INLINE void put_step(float* panel, const typename K::elem* w, long step) {
    for (int v = 0; v < K::VECS; ++v) {
        vf rows[4];
        for (int r = 0; r < 4; ++r) rows[r] = K::weight(w + r * step, v);
        put_turned(panel + v * LANES * PANEL, rows);
    }
}

// Rows of weights as panels for tokens that are arranged for K, completed with zeros; `width` numbers of each, by `column`. A
// piece of a panel is written at once, while it is in the first cache.
template <class K>
static void pack_panels(float* panel, const typename K::elem* w, long step, long column, long rows, long width) {
    const long padded = up_to(width, K::STEP), whole = column == 1 ? width / K::STEP * K::STEP : 0;
    for (long first = 0; first < rows; first += PANEL, panel += PANEL * padded)
        for (long begin = 0; begin < padded; begin += PIECE)
            for (long r = first; r < first + PANEL; r += 4) {
                float* to = panel + r - first;
                const long end = least(begin + PIECE, padded);
                long k = begin;
                for (; r + 4 <= rows && k < least(end, whole); k += K::STEP) put_step<K>(to + k * PANEL, w + r * step + k, step);
                for (; k < end; k += K::STEP) {
                    typename K::elem some[4 * K::STEP] = {};
                    for (long i = 0; i < 4 && r + i < rows; ++i)
                        for (long j = 0; j < K::STEP && k + j < width; ++j) some[i * K::STEP + j] = w[(r + i) * step + (k + j) * column];
                    put_step<K>(to + k * PANEL, some, K::STEP);
                }
            }
}

// Adds `steps` numbers of each of T tokens, from `from` on, to out, or begins with them.
template <int T>
static void outer(const float* panel, long from, long steps, const float* const* x, float* out, long pitch, Ahead ahead) {
    vf a[T], b[T];
    const float* xs[T];
    for (int t = 0; t < T; ++t) a[t] = b[t] = (vf){}, xs[t] = x[t] + from;
    for (long k = 0; k < steps; ++k, panel += PANEL) {
        if (k % 4 == 0) ahead.line();
        const vf first = load<vf>(panel), second = load<vf>(panel + LANES);
        for (int t = 0; t < T; ++t) {
            const vf token = broadcast(xs[t][k]);
            a[t] += first * token, b[t] += second * token;
        }
    }
    for (int t = 0; t < T; ++t) {
        float* to = out + t * pitch;
        store(to, from ? load<vf>(to) + a[t] : a[t]);
        store(to + LANES, from ? load<vf>(to + LANES) + b[t] : b[t]);
    }
}

// Panels with tokens: out [tokens][pitch], a whole number of panels of each. next: what is fetched meanwhile, so many rows.
static void multiply_panels(const float* panel, long rows, long width, const float* const* x, long tokens, float* out, long pitch,
                            Soon next) {
    const long squads = (tokens + SQUAD - 1) / SQUAD, slices = (width + SLICE - 1) / SLICE;
    const long turns = up_to(rows, PANEL) / PANEL * slices * squads;
    long turn = 0;
    for (long r = 0; r < rows; r += PANEL, panel += PANEL * width)
        for (long from = 0; from < width; from += SLICE)
            for (long t = 0; t < tokens; t += SQUAD, ++turn) {
                const Ahead ahead(next, rows, turn, turns);
                at_most_tokens<SQUAD>(tokens - t, [&](auto n) {
                    outer<n>(panel + from * PANEL, from, least(SLICE, width - from), x + t, out + t * pitch + r, pitch, ahead);
                });
            }
}

}  // namespace

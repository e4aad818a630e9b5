// Products of rows of weights with tokens, the only matrix product there is: both lie along the hidden width, so weights are
// read as they are stored, once for up to MAX_T tokens at a time. Every output is summed over the same lanes in the same
// order, whatever is computed beside it: a token's result does not depend on the batch.

#pragma once

#include <type_traits>

#include "vectors.h"

namespace {

constexpr int MAX_T = 4;  // tokens at a time
#if LANES == 16
constexpr int ROWS_AT_ONCE[MAX_T + 1] = {0, 8, 8, 8, 6};  // accumulators in 32 registers
constexpr int STREAMS[MAX_T + 1] = {0, 4, 4, 4, 6};       // rows at once that come from memory
#else
constexpr int ROWS_AT_ONCE[MAX_T + 1] = {0, 8, 4, 4, 3};  // in 16
constexpr int STREAMS[MAX_T + 1] = {0, 4, 4, 4, 3};
#endif
constexpr int MAX_R = 8;
constexpr int MAX_ROWS = 48;  // of one product: what one thread takes at a time
constexpr long STREAMED = 24;  // tokens up to which the processor multiplies faster than rows come from memory
constexpr long BLOCK_BYTES = 4096;  // of a token, so that MAX_T of them stay in the first cache

// How weights of one kind are multiplied: STEP numbers in VECS vectors, with tokens that were arranged for it; a step is one
// vector of memory. `at` is the place of number i of a step among the arranged ones; NATURAL: its own.

struct Float {
    typedef float elem;
    typedef float token;
    enum { STEP = LANES, VECS = 1, NATURAL = 1 };
    static vf weight(const elem* p, int) { return load<vf>(p); }
    static vf mac(vf acc, vf w, const token* x) { return acc + w * load<vf>(x); }
    static int at(int i) { return i; }
};

struct Half : Float {
    typedef uint16_t elem;
    enum { STEP = 2 * LANES, VECS = 2 };
    static vf weight(const elem* p, int v) { return widen_half(load<vh>(p + v * LANES)); }
};

struct Int8 : Float {
    typedef int8_t elem;
    enum { STEP = 4 * LANES, VECS = 4 };
    static vf weight(const elem* p, int v) { return widen_int8(load<vb>(p + v * LANES)); }
};

// A word holds two numbers: those in its low halves, then those in its high halves.
struct Bfloat : Float {
    typedef uint16_t elem;
    enum { STEP = 2 * LANES, VECS = 2, NATURAL = 0 };
    static vf weight(const elem* p, int v) { return v == 0 ? (vf)(load<vu>(p) << 16) : (vf)(load<vu>(p) & 0xffff0000u); }
    static int at(int i) { return (i & 1) * LANES + i / 2; }
};

// Pairs of bfloat16 in one instruction.
struct Pairs {
    typedef uint16_t elem;
    typedef uint16_t token;
    enum { STEP = 2 * LANES, VECS = 1, NATURAL = 1 };
    static vf weight(const elem* p, int) { return load<vf>(p); }
    static vf mac(vf acc, vf w, const token* x) { return dot_pairs(acc, (vu)w, load<vu>(x)); }
    static int at(int i) { return i; }
};

template <class K>
INLINE void put(typename K::token* row, long i, float value) {
    typename K::token* place = row + i / K::STEP * K::STEP + K::at(i % K::STEP);
    *place = sizeof *row == 2 ? (typename K::token)narrow_bfloat(broadcast(value))[0] : (typename K::token)value;
}

constexpr int split(int l) { return l < LANES / 2 ? 2 * l : 2 * l - LANES + 1; }  // even lanes, then odd ones

// The first `count` of LANES numbers, from place i on.
template <class K>
INLINE void put_some(typename K::token* row, long i, vf y, long count) {
    if (count == LANES && K::NATURAL && sizeof *row == 4) {
        store(row + i, y);
    } else if (count == LANES && K::NATURAL) {
        store(row + i, __builtin_convertvector(narrow_bfloat(y), vh));
    } else if (count == LANES && i % LANES == 0) {
        const vf both = pick<split>(y, y);
        typename K::token* place = row + i / K::STEP * K::STEP + i % K::STEP / 2;
        memcpy(place, &both, sizeof both / 2);
        memcpy(place + LANES, (const char*)&both + sizeof both / 2, sizeof both / 2);
    } else {
        float some[LANES];
        store(some, y);
        for (long l = 0; l < count; ++l) put<K>(row, i + l, some[l]);
    }
}

// A token of any float dtype as K wants it, completed with zeros to a whole step.
template <class K>
static void arrange_row(typename K::token* row, const void* from, long dtype, long width) {
    const bool natural = K::NATURAL;
    long i = 0;
    if (natural && size_of(dtype) == (long)sizeof *row && (sizeof *row == 4 || dtype == BFLOAT16)) {
        memcpy(row, from, width * sizeof *row), i = width;
    } else if (natural && sizeof *row == 4) {
        for (; i + LANES <= width; i += LANES) store(row + i, to_floats(from, i, dtype));
    } else if (!natural && dtype == BFLOAT16) {
        for (; i + K::STEP <= width; i += K::STEP)
            for (int v = 0; v < K::VECS; ++v) store(row + i + v * LANES, K::weight((const typename K::elem*)from + i, v));
    }
    for (; i < width; ++i) put<K>(row, i, to_float(from, i, dtype));
    for (; i < up_to(width, K::STEP); ++i) put<K>(row, i, 0.0f);
}

// Rows that will be read next and are fetched meanwhile, in bytes.
struct Soon {
    const char* row;
    long step, length;
};

// Lines of memory that are fetched into the second cache bit by bit, row after row.
class Ahead {
   public:
    // Part `part` of `parts` of so many rows.
    Ahead(Soon soon, long rows, long part, long parts) : length_(soon.length), step_(soon.step) {
        if (!soon.row) return;
        const long lines = (soon.length + 63) / 64, begin = part * rows * lines / parts;
        left_ = (part + 1) * rows * lines / parts - begin;
        row_ = soon.row + begin / lines * soon.step;
        at_ = row_ + begin % lines * 64;
    }

    inline __attribute__((always_inline)) void line() {
        if (left_ <= 0) return;
        __builtin_prefetch(at_, 0, 2);
        --left_, at_ += 64;
        if (at_ >= row_ + length_) row_ += step_, at_ = row_;
    }

    void all() {
        while (left_ > 0) line();
    }

   private:
    long left_ = 0, length_, step_;
    const char *row_ = nullptr, *at_ = nullptr;
};

template <class K, int R, int T>
static void tile(const typename K::elem* w, long step, const typename K::token* const* x, long from, long steps, vf* acc, bool fresh) {
    constexpr int TOKEN_STEP = K::STEP / K::VECS;
    vf a[T][R];
    const typename K::token* xs[T];
    for (int t = 0; t < T; ++t) {
        xs[t] = x[t] + from;
        for (int r = 0; r < R; ++r) a[t][r] = fresh ? (vf){} : acc[t * R + r];
    }
    for (long s = 0; s < steps; ++s) {
        for (int v = 0; v < K::VECS; ++v) {
            vf row[R];
            for (int r = 0; r < R; ++r) row[r] = K::weight(w + r * step + s * K::STEP, v);
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r) a[t][r] = K::mac(a[t][r], row[r], xs[t] + (s * K::VECS + v) * TOKEN_STEP);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) acc[t * R + r] = a[t][r];
}

// R rows with T tokens, all steps from `from` on; a part of a step at the end is completed with zeros.
template <class K, int R, int T>
static void block(const typename K::elem* w, long step, const typename K::token* const* x, long from, long to, vf* acc, bool fresh) {
    long steps = (to - from) / K::STEP, rest = (to - from) % K::STEP;
    tile<K, R, T>(w + from, step, x, from, steps, acc, fresh);
    if (rest) {
        typename K::elem tail[R * K::STEP] = {};
        long done = from + steps * K::STEP;
        for (int r = 0; r < R; ++r) memcpy(tail + r * K::STEP, w + r * step + done, rest * sizeof *tail);
        tile<K, R, T>(tail, K::STEP, x, done, 1, acc, fresh && !steps);
    }
}

// Calls f with the number of tokens, T at most, as a constant.
template <int T, class F>
INLINE void at_most_tokens(long n, F f) {
    if constexpr (T > 1)
        if (n < T) return at_most_tokens<T - 1>(n, f);
    f(std::integral_constant<int, T>());
}

template <class K>
struct Product {
    typedef typename K::elem elem;
    typedef typename K::token token;

    const elem* w;
    long step, rows, width;  // width: numbers of a row
    const token* const* x;
    long tokens;
    float* out;  // [tokens][pitch]
    long pitch;
    vf* acc;  // room for every group of rows of every token of one call
    Soon next;

    // Sums of the groups of T tokens; group g's rows are apart(g), from first(g) on.
    template <int R, int T, class First, class Apart>
    void scatter(const vf* a, long groups, long t, First first, Apart apart) const {
        float flat[MAX_T * (MAX_ROWS + MAX_R) + LANES];
        const long count = groups * R * T;
        for (long v = 0; v < count; v += LANES) store(flat + v, sums(a + v));
        for (long g = 0; g < groups; ++g)
            for (int i = 0; i < T; ++i)
                for (int r = 0; r < R; ++r) out[(t + i) * pitch + first(g) + r * apart(g)] = flat[(g * T + i) * R + r];
    }

    // Many tokens: rows stay in the cache, and what comes after this product is fetched bit by bit between the tiles. The last
    // group overlaps the one before it if rows do not divide.
    template <int R, int T>
    void tokens_at(long t, long from, long to, vf* a, long turn, long turns) const {
        const long groups = (rows + R - 1) / R;
        auto first = [&](long g) { return least(g * R, rows - R); };
        for (long g = 0; g < groups; ++g) {
            Ahead(next, rows, turn * groups + g, turns * groups).all();
            block<K, R, T>(w + first(g) * step, step, x + t, from, to, a + g * R * T, from == 0);
        }
        if (to == width) scatter<R, T>(a, groups, t, first, [](long) { return 1; });
    }

    // Few tokens: rows come from memory, each once. Those that are read together lie far apart, so that each is a stream of
    // its own to the processor, which fetches ahead in all of them. Those that are left over when rows do not divide lie
    // together, with some that were done.
    template <int R, int T>
    void stream() const {
        const long evenly = rows / R, groups = evenly + (rows % R > 0), parts = (tokens + T - 1) / T;
        auto first = [&](long g) { return g < evenly ? g : rows - R; };
        auto apart = [&](long g) { return g < evenly ? evenly : 1; };
        auto at = [&](long p) { return acc + p * groups * R * T; };
        for (long g = 0; g < groups; ++g)
            for (long p = 0; p < parts; ++p)
                at_most_tokens<T>(tokens - p * T, [&](auto n) {
                    block<K, R, n>(w + first(g) * step, apart(g) * step, x + p * T, 0, width, at(p) + g * R * n, true);
                });
        for (long p = 0; p < parts; ++p)
            at_most_tokens<T>(tokens - p * T, [&](auto n) { scatter<R, n>(at(p), groups, p * T, first, apart); });
    }

    void run() const {
        if (tokens <= STREAMED)
            return at_most_tokens<MAX_T>(tokens, [&](auto n) {
                constexpr int R = STREAMS[n];
                rows >= R ? stream<R, n>() : stream<1, n>();
            });
        const long block = BLOCK_BYTES / (long)sizeof(token), blocks = (width + block - 1) / block;
        const long quads = (tokens + MAX_T - 1) / MAX_T, span = MAX_T * (rows + MAX_R);
        for (long from = 0; from < width; from += block) {
            const long to = from + block < width ? from + block : width;
            for (long q = 0; q < quads; ++q) {
                vf* a = acc + (blocks > 1 ? q * span : 0);
                const long t = q * MAX_T, turn = from / block * quads + q, turns = blocks * quads;
                at_most_tokens<MAX_T>(tokens - t, [&](auto n) {
                    constexpr int R = ROWS_AT_ONCE[n];
                    rows >= R ? tokens_at<R, n>(t, from, to, a, turn, turns) : tokens_at<1, n>(t, from, to, a, turn, turns);
                });
            }
        }
    }
};

}  // namespace

// The chosen experts of every token, on the CPU: y[t] = sum_k w[t][k] expert(x[t]).
//
// Three rounds of tasks that any thread may take: tokens are arranged; rows of gate and up are multiplied and joined by the
// activation; rows of down are multiplied, weighted and added into the output. A task of the last round owns its columns of the
// output and adds experts in the order of their ids, so the result is the same in every run and with any number of threads; by
// the products of dots.h it is the same whatever else is in the batch.
//
// With several nodes of memory, each has an equal part of the experts. Where time goes into reading weights (few tokens), a
// node's threads take the tasks of its experts first, and a fourth round adds the sums of the nodes.

#include <optional>
#include <type_traits>

#include "outer.h"
#include "pool.h"
#include "tiles.h"

namespace {

enum Kind { SILU, GELU, GELU_TANH, RELU, RELU2 };
enum Layout { CONCAT, INTERLEAVED, UNGATED };

}  // namespace

// Strides in elements. Absent tensors are null.
struct Call {
    const void* x;            // [tokens][hidden], or a row for each slot
    const int64_t* ids;       // [tokens][top_k], any outside 0 .. experts - 1 is no expert
    const float* weights;     // [tokens][top_k], null: 1
    const void* w13;          // [experts][rows][hidden]
    const void* w2;           // [experts][hidden][inter]
    const void* b13;          // [experts][rows], contiguous, dtype of x
    const void* b2;           // [experts][hidden]
    const float* w13_scale;   // int8: [experts][rows], contiguous
    const float* w2_scale;    // [experts][hidden]
    float* out;               // [tokens][hidden], or [tokens][top_k][hidden] for rows
    int64_t tokens, top_k, experts, hidden, inter;
    int64_t x_step;
    int64_t w13_expert, w13_row, w13_column, w2_expert, w2_row, w2_column;
    int64_t x_dtype, w_dtype, layout, kind;
    int64_t per_slot;  // x has a row for each slot
    int64_t rows;      // unweighted rows out
    int64_t invariant; // a token's bits do not depend on the batch
    double alpha, beta, limit, gate_softcap, up_softcap;  // limit: infinity for none; softcap: 0 for none
    int64_t clamp_after;
    int64_t threads;
    Fork fork;  // starts threads; null: own ones
    const int32_t* node_of_cpu;  // of memory, by the number of the processor
    int64_t cpus, nodes;
};

namespace {

constexpr long CHUNK = 64;  // tokens of one expert that are multiplied at a time
constexpr long TOKENS_A_TASK = 4;
constexpr long TASKS_A_THREAD = 8;
constexpr long ROOM = (MAX_ROWS + PANEL - 1) / PANEL * PANEL;  // numbers of one token that a product may write
constexpr long CACHED = 1024;  // numbers of MAX_ROWS rows that leave room in the second cache
constexpr long TILED = 16;     // tokens of an expert, from which on tiles are worth their packing
constexpr long SHIFT = 64;  // bytes between rows, so that they do not share one set of the cache

// What stands between an expert's two products; see ActivationSpec.
struct Activation {
    explicit Activation(const Call& c)
        : kind(c.kind), alpha(c.alpha), beta(c.beta), limit(c.limit), gate_softcap(c.gate_softcap), up_softcap(c.up_softcap),
          limited(c.limit < __builtin_inf()), after(c.clamp_after) {}

    inline __attribute__((always_inline)) vf of_gate(vf g) const {
        if (!limited) return nonlinear(g);
        return after ? at_most(nonlinear(g), limit) : nonlinear(at_most(g, limit));
    }

    inline __attribute__((always_inline)) vf of_up(vf u) const {
        if (limited) u = at_least(at_most(u, limit), -limit);
        if (up_softcap) u = up_softcap * hyperbolic_tangent(u / up_softcap);
        return u + beta;
    }

   private:
    inline __attribute__((always_inline)) vf nonlinear(vf g) const {
        switch (kind) {
            case SILU: {
                vf head = gate_softcap ? gate_softcap * hyperbolic_tangent(g / gate_softcap) : g;
                return head * sigmoid(alpha * g);
            }
            case GELU: return 0.5f * g * (1.0f + error_function(g * 0.70710678f));
            case GELU_TANH: return g * sigmoid(1.59576912f * (g + 0.044715f * g * g * g));
            default: {
                vf positive = at_least(g, 0.0f);
                return kind == RELU ? positive : positive * positive;
            }
        }
    }

    long kind;
    float alpha, beta, limit, gate_softcap, up_softcap;
    bool limited, after;
};

// The slots of one expert that was chosen: rows begin .. begin + count in the order of experts.
struct Run {
    long expert, begin, count;
};

// Rows of one expert's matrix, strides in elements.
template <class E>
struct Rows {
    const E* at;
    long step, column;
};

template <class K>
class Layer {
    typedef typename K::elem elem;
    typedef typename K::token token;
    typedef typename std::conditional<sizeof(token) == 2, Pairs, Float>::type Panel;
    static constexpr bool WIDENS = sizeof(elem) < sizeof(token);
    static constexpr bool HAS_OUTER = sizeof(token) == 4;
#ifdef TILES
    static constexpr bool HAS_TILES = std::is_same<K, Pairs>::value;
#else
    static constexpr bool HAS_TILES = false;
#endif

   public:
    explicit Layer(const Call& call) : c(call), activation(call), slot_count(call.tokens * call.top_k) {
        x_pitch = pitch(c.hidden), h_pitch = pitch(c.inter);
        tiled = HAS_TILES && !c.invariant && slot_count >= TILED * c.experts;
        const bool few = slot_count <= STREAMED * c.experts;
        const long all = MAX_ROWS / PANEL * PANEL, fewer = HAS_OUTER ? PANEL : MAX_ROWS / 2;
        up_part = tiled ? TILE_ROWS : few ? part_of(least(slot_count, c.experts) * c.inter) : 2 * c.hidden > CACHED ? fewer : all;
        down_part = tiled ? TILE_ROWS : few ? part_of(c.hidden) : c.inter <= CACHED ? all : fewer;
        nodes = few && !tiled && !c.invariant && c.threads > 1 && c.nodes > 1 ? least(c.nodes, MAX_NODES) : 1;
    }

    bool run(Arena& arena) {
        if (!place(arena, [&](Cut& cut) { lay_out(cut); })) return false;
        sort();
        arrange.count = ((tiled ? row_count : x_count()) + TOKENS_A_TASK - 1) / TOKENS_A_TASK;
        up_parts = (c.inter + up_part - 1) / up_part;
        down_parts = (c.hidden + down_part - 1) / down_part;
        up.count = run_count * up_parts;
        down.count = nodes * down_parts;
        join.count = nodes > 1 && !c.rows ? (c.tokens + TOKENS_A_TASK - 1) / TOKENS_A_TASK : 0;
        up.nodes = down.nodes = nodes;
        for (long n = 0; n < nodes; ++n) up.begin[n] = first_run[n] * up_parts, down.begin[n] = n * down_parts;
        const double work = 3.0 * run_count * c.hidden * c.inter;  // numbers to read
        run_threads(thread, this, least(c.threads, 1 + (long)(work / READS_A_THREAD)), c.fork);
        return true;
    }

   private:
    struct Scratch {
        float *gate, *up;  // [CHUNK][ROOM]
        vf* acc;
        token* panel;  // rows of gate and up, or of down, as tokens lie
    };

    const Call& c;
    const Activation activation;
    const long slot_count;
    long up_part, down_part;  // rows of gate and of up, and of down, that a task takes
    bool tiled;  // tokens lie in the order of experts, so that those of one are evenly apart
    long x_pitch, h_pitch, up_parts = 0, down_parts = 0, run_count = 0, row_count = 0;
    long nodes, first_run[MAX_NODES + 1] = {};  // of each node
    float* node_sums;  // [nodes - 1][tokens][hidden], of all but the first node
    int32_t* slots;  // in the order of experts
    Run* runs;
    const token **x_rows, **h_rows;
    token *x, *h;
    char* scratch;
    size_t scratch_size;
    Tasks arrange, up, down, join;
    std::atomic<long> joined{0};

    // So many of these rows that every thread has several tasks; memory likes long ones.
    long part_of(long rows) const { return least(MAX_ROWS, up_to(rows / (TASKS_A_THREAD * c.threads) + 1, 16)); }

    static long pitch(long width) { return up_to(width, K::STEP) + SHIFT / (long)sizeof(token); }
    long x_count() const { return c.per_slot || tiled ? slot_count : c.tokens; }
    bool by_tiles(const Run& run) const { return tiled && run.count >= TILED; }
    bool by_outer(const Run& run) const { return HAS_OUTER && !c.invariant && run.count > STREAMED; }

    void lay_out(Cut& cut) {
        slots = cut.take<int32_t>(slot_count);
        runs = cut.take<Run>(c.experts + 1);
        x_rows = cut.take<const token*>(slot_count);
        h_rows = cut.take<const token*>(slot_count);
        const long beyond = tiled ? SIDE : 0;  // rows that the last tile reads too
        x = cut.take<token>((x_count() + beyond) * x_pitch);
        h = cut.take<token>((slot_count + beyond) * h_pitch);
        node_sums = cut.take<float>(c.rows ? 0 : (nodes - 1) * c.tokens * c.hidden);
        Cut one = {nullptr, 0};
        lay_out_scratch(one);
        scratch_size = one.used;
        scratch = cut.take<char>(scratch_size * c.threads);
    }

    Scratch lay_out_scratch(Cut& cut) const {
        Scratch s;
        s.gate = cut.take<float>(CHUNK * ROOM);
        s.up = cut.take<float>(CHUNK * ROOM);
        s.acc = cut.take<vf>((CHUNK + MAX_T) * (MAX_ROWS + MAX_R) + LANES);
        const long up = 2 * up_to(up_part, PANEL) * x_pitch, down = up_to(down_part, PANEL) * h_pitch;
        s.panel = cut.take<token>(up > down ? up : down);
        return s;
    }

    long x_row(long slot) const { return c.per_slot ? slot : slot / c.top_k; }
    bool chosen(long slot) const { return c.ids[slot] >= 0 && c.ids[slot] < c.experts; }

    // Slots in the order of experts, by counting.
    void sort() {
        for (long e = 0; e <= c.experts; ++e) runs[e] = {e, 0, 0};
        for (long s = 0; s < slot_count; ++s)
            if (chosen(s)) ++runs[c.ids[s]].count;
        for (long e = 1; e <= c.experts; ++e) runs[e].begin = runs[e - 1].begin + runs[e - 1].count;
        for (long s = 0; s < slot_count; ++s)
            if (chosen(s)) slots[runs[c.ids[s]].begin++] = (int32_t)s;
        for (long e = 0; e < c.experts; ++e) {
            runs[e].begin -= runs[e].count;
            if (runs[e].count) runs[run_count++] = runs[e];
        }
        for (long n = 0, r = 0; n <= nodes; ++n) {
            while (r < run_count && runs[r].expert * nodes / c.experts < n) ++r;
            first_run[n] = r;
        }
        row_count = run_count ? runs[run_count - 1].begin + runs[run_count - 1].count : 0;
        for (long r = 0; r < row_count; ++r) {
            x_rows[r] = x + (tiled ? r : x_row(slots[r])) * x_pitch;
            h_rows[r] = h + r * h_pitch;
        }
    }

    static void thread(void* layer) { ((Layer*)layer)->work(); }

    void work() {
        Cut cut = {scratch + scratch_size * joined.fetch_add(1), 0};
        const Scratch s = lay_out_scratch(cut);
#ifdef TILES
        std::optional<TileSetup> setup;
        if (tiled) setup.emplace();
#endif
        const int cpu = nodes > 1 ? sched_getcpu() : -1;
        const long node = cpu >= 0 && cpu < c.cpus ? c.node_of_cpu[cpu] : 0;
        arrange.each([&](long task, long) { arrange_tokens(task); });
        up.each([&](long task, long next) { gate_and_up(task, next, s); }, node);
        down.each([&](long task, long next) { down_into(task, next, s); }, node);
        join.each([&](long task, long) { join_nodes(task); });
    }

    void arrange_tokens(long task) {
        const long end = least((task + 1) * TOKENS_A_TASK, tiled ? row_count : x_count());
        for (long t = task * TOKENS_A_TASK; t < end; ++t) {
            const char* from = (const char*)c.x + (tiled ? x_row(slots[t]) : t) * c.x_step * size_of(c.x_dtype);
            arrange_row<K>(x + t * x_pitch, from, c.x_dtype, c.hidden);
        }
    }

    // Rows of weights as tokens lie, or packed for tiles.
    void fill(token* panel, Rows<elem> w, const Run& run, long rows, long width) const {
#ifdef TILES
        if constexpr (HAS_TILES)
            if (by_tiles(run)) return pack_tiles(panel, w.at, w.step, w.column, rows, width);
#endif
        if constexpr (HAS_OUTER)
            if (by_outer(run)) return pack_panels<K>(panel, w.at, w.step, w.column, rows, width);
        widen(panel, w, rows, width);
    }

    void widen(token* panel, Rows<elem> w, long rows, long width) const {
        const long step = pitch(width);
        for (long r = 0; r < rows; ++r) {
            const elem* row = w.at + r * w.step;
            token* to = panel + r * step;
            long k = 0;
            for (; w.column == 1 && k + K::STEP <= width; k += K::STEP) widen_step(to + k, row + k);
            for (; k < width; k += K::STEP) {
                elem some[K::STEP] = {};
                for (long i = 0; i < K::STEP && k + i < width; ++i) some[i] = row[(k + i) * w.column];
                widen_step(to + k, some);
            }
        }
    }

    static inline __attribute__((always_inline)) void widen_step(token* to, const elem* from) {
        if (WIDENS)
            for (int v = 0; v < K::VECS; ++v) store(to + v * LANES, K::weight(from, v));
        else
            memcpy(to, from, K::STEP * sizeof(elem));
    }

    // Weights are widened once for many tokens, and copied where they lie across.
    bool by_panel(Rows<elem> w, const Run& run) const {
        return w.column != 1 || (WIDENS && run.count > STREAMED) || by_tiles(run) || by_outer(run);
    }

    // next: what this thread will read after this.
    void multiply(Rows<elem> w, const token* panel, const Run& run, long rows, long width, const token* const* tokens, long n,
                  float* out, vf* acc, Rows<elem> next) const {
#ifdef TILES
        if constexpr (HAS_TILES)
            if (by_tiles(run)) return multiply_tiles(panel, width, tokens[0], pitch(width), n, out, ROOM);
#endif
        const long size = sizeof(elem);
        const Soon soon = {(const char*)next.at, next.step * size, width * size};
        if constexpr (HAS_OUTER)
            if (by_outer(run)) return multiply_panels(panel, rows, up_to(width, K::STEP), tokens, n, out, ROOM, soon);
        if (panel)
            Product<Panel>{(const typename Panel::elem*)panel, pitch(width), rows, up_to(width, K::STEP), tokens, n, out, ROOM, acc, soon}.run();
        else
            Product<K>{w.at, w.step, rows, width, tokens, n, out, ROOM, acc, soon}.run();
    }

    Rows<elem> gate_rows(const Run& run, long i) const {
        const long step = c.layout == INTERLEAVED ? 2 * c.w13_row : c.w13_row;
        return {(const elem*)c.w13 + run.expert * c.w13_expert + i * step, step, c.w13_column};
    }

    Rows<elem> up_rows(const Run& run, long i) const {
        Rows<elem> rows = gate_rows(run, i);
        rows.at += c.layout == INTERLEAVED ? c.w13_row : c.inter * c.w13_row;
        return rows;
    }

    // Sums of products as values: times the scale of the row, plus its bias. row: in w13 or w2.
    void finish(float* values, long n, const float* scale, const void* bias, long row, long step) const {
        for (long i = 0; i < n && (scale || bias); ++i) {
            const long r = row + i * step;
            float value = values[i] * (scale ? scale[r] : 1.0f);
            values[i] = bias ? value + to_float(bias, r, c.x_dtype) : value;
        }
    }

    void gate_and_up(long task, long next, const Scratch& s) const {
        const bool gated = c.layout != UNGATED;
        const Run& run = runs[task / up_parts];
        const long i = task % up_parts * up_part, n = least(up_part, c.inter - i);
        const Rows<elem> gate = gate_rows(run, i), up = up_rows(run, i), none = {nullptr, 0, 1};
        const bool panel = by_panel(gate, run);
        token *gate_panel = nullptr, *up_panel = nullptr;
        if (panel) {
            gate_panel = s.panel, up_panel = s.panel + up_to(up_part, PANEL) * x_pitch;
            fill(gate_panel, gate, run, n, c.hidden);
            if (gated) fill(up_panel, up, run, n, c.hidden);
        }
        Rows<elem> gate_next = none, up_next = none;
        if (next < this->up.count) {
            gate_next = gate_rows(runs[next / up_parts], next % up_parts * up_part);
            up_next = up_rows(runs[next / up_parts], next % up_parts * up_part);
        } else {
            gate_next = down_rows(runs[0], 0);
        }
        const long first = run.expert * (gated ? 2 : 1) * c.inter, step = c.layout == INTERLEAVED ? 2 : 1;
        const long first_up = first + (c.layout == INTERLEAVED ? 1 : c.inter);
        for (long from = 0; from < run.count; from += CHUNK) {
            const long count = least(CHUNK, run.count - from);
            const token* const* tokens = x_rows + run.begin + from;
            const bool last = from + count == run.count;
            multiply(gate, gate_panel, run, n, c.hidden, tokens, count, s.gate, s.acc, !last ? none : panel || !gated ? gate_next : up);
            if (gated) multiply(up, up_panel, run, n, c.hidden, tokens, count, s.up, s.acc, !last ? none : panel ? up_next : gate_next);
            for (long t = 0; t < count; ++t) {
                float *g = s.gate + t * ROOM, *u = s.up + t * ROOM;
                finish(g, n, c.w13_scale, c.b13, first + i * step, step);
                if (gated) finish(u, n, c.w13_scale, c.b13, first_up + i * step, step);
                token* row = h + (run.begin + from + t) * h_pitch;
                for (long j = 0; j < n; j += LANES) {
                    vf y = activation.of_gate(load<vf>(g + j));
                    if (gated) y *= activation.of_up(load<vf>(u + j));
                    put_some<K>(row, i + j, y, least(LANES, n - j));
                }
                for (long j = i + n; i + n == c.inter && j < up_to(c.inter, K::STEP); ++j) put<K>(row, j, 0.0f);
            }
        }
    }

    Rows<elem> down_rows(const Run& run, long n) const {
        return {(const elem*)c.w2 + run.expert * c.w2_expert + n * c.w2_row, c.w2_row, c.w2_column};
    }

    void down_into(long task, long next, const Scratch& s) const {
        const long node = task / down_parts, first = task % down_parts * down_part, n = least(down_part, c.hidden - first);
        float* out = node && !c.rows ? node_sums + (node - 1) * c.tokens * c.hidden : c.out;
        for (long t = 0; t < (c.rows ? slot_count : c.tokens); ++t)
            if (!c.rows || (!node && !chosen(t))) memset(out + t * c.hidden + first, 0, n * sizeof(float));
        const Run* end = runs + first_run[node + 1];
        for (const Run* run = runs + first_run[node]; run < end; ++run) {
            const Rows<elem> down = down_rows(*run, first), none = {nullptr, 0, 1};
            const bool panel = by_panel(down, *run);
            if (panel) fill(s.panel, down, *run, n, c.inter);
            Rows<elem> then = none;
            if (run + 1 < end)
                then = down_rows(run[1], first);
            else if (next < this->down.count && first_run[next / down_parts] < run_count)
                then = down_rows(runs[first_run[next / down_parts]], next % down_parts * down_part);
            for (long from = 0; from < run->count; from += CHUNK) {
                const long count = least(CHUNK, run->count - from);
                const bool last = from + count == run->count;
                multiply(down, panel ? s.panel : nullptr, *run, n, c.inter, h_rows + run->begin + from, count, s.gate, s.acc, last ? then : none);
                for (long t = 0; t < count; ++t) {
                    float* y = s.gate + t * ROOM;
                    finish(y, n, c.w2_scale, c.b2, run->expert * c.hidden + first, 1);
                    add(out + first, y, slots[run->begin + from + t], n);
                }
            }
        }
    }

    void add(float* out, const float* y, long slot, long n) const {
        if (c.rows) {
            memcpy(out + slot * c.hidden, y, n * sizeof(float));
            return;
        }
        const float weight = c.weights ? c.weights[slot] : 1.0f;
        out += slot / c.top_k * c.hidden;
        for (long i = 0; i < n; ++i) out[i] += weight * y[i];
    }

    void join_nodes(long task) const {
        const long begin = task * TOKENS_A_TASK * c.hidden, end = least(begin + TOKENS_A_TASK * c.hidden, c.tokens * c.hidden);
        for (long n = 0; n < nodes - 1; ++n)
            for (long i = begin; i < end; ++i) c.out[i] += node_sums[n * c.tokens * c.hidden + i];
    }
};

template <class K>
int run(const Call& call) {
    return Layer<K>(call).run(arena) ? 0 : 1;
}

}  // namespace

extern "C" {

// Returns 0; 1 where there is no memory; 2 for numbers of a kind that it does not know.
__attribute__((visibility("default"))) int moerunner_experts(const Call* call) {
    switch (call->w_dtype) {
        case FLOAT32: return run<Float>(*call);
#ifdef PAIRS
        case BFLOAT16: return run<Pairs>(*call);
#else
        case BFLOAT16: return run<Bfloat>(*call);
#endif
        case FLOAT16: return run<Half>(*call);
        case INT8: return run<Int8>(*call);
    }
    return 2;
}

// Gives back the memory that the calling thread keeps between calls.
__attribute__((visibility("default"))) void moerunner_release() { arena.release(); }

// Bytes that the calling thread keeps.
__attribute__((visibility("default"))) int64_t moerunner_kept() { return (int64_t)arena.size(); }

}  // extern "C"

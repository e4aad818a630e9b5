// Routing: from logits, or from few tokens and the gate, to the ids and weights of the chosen experts.
//
// The rules are those of ops/route.py, in float32 with its roundings but for sums, which are in double. A token's result does not
// depend on the batch, nor on the number of threads. Functions are the C library's, which know infinities and subnormal numbers:
// a token has some hundred logits, a chosen expert millions of weights.

#include <math.h>

#include "dots.h"
#include "pool.h"

namespace {

enum Score { SOFTMAX, SIGMOID, SQRTSOFTPLUS, SOFTMAX_TOPK, SIGMOID_TOPK, SPARSEMIXER };
enum Renormalise { NONE, SUM, MAX_SUM, P_NORM };

}  // namespace

// Strides in elements. Absent tensors are null; all but x, the gate and ids are float32 and contiguous.
struct RouteCall {
    const void* x;      // logits [tokens][logits], or with a gate tokens [tokens][hidden]
    const void* gate;   // [logits][hidden]
    const float* gate_bias;       // [logits]
    const float* selection_bias;  // [experts], added to keys
    const float* expert_scale;    // [experts], on weights
    const float* global_scale;    // [1], on all weights
    const int64_t* given;  // [tokens][top_k], ids in place of a choice
    const int64_t* types;  // [tokens], the set of experts of each token
    int64_t* ids;          // [tokens][top_k]
    float* weights;        // [tokens][top_k]
    float* shared;         // [tokens][logits - experts]
    int64_t tokens, logits, experts, top_k, hidden;
    int64_t x_row, x_column, gate_row;
    int64_t x_dtype, gate_dtype;
    int64_t score, by_logit, groups, kept, best_two, renormalise, sets;
    double scale, softcap, fill, eps, p, jitter, factor;  // softcap: 0 for none; fill: of the groups that lose
    int64_t threads;
    Fork fork;  // starts threads; null: own ones
};

namespace {

constexpr long GATE_ROWS = 16;       // that a task multiplies
constexpr long LOGITS_A_TASK = 2048;
constexpr float NEG = -INFINITY;

// The k largest keys, largest first, the first of equals first; NaN is below everything. best: room for k.
void largest(const float* key, long n, long k, int64_t* ids, float* best) {
    long held = 0;
    for (long i = 0; i < n; ++i) {
        const float x = key[i] == key[i] ? key[i] : NEG;
        if (held == k && !(x > best[k - 1])) continue;
        long at = held < k ? held++ : k - 1;
        for (; at > 0 && x > best[at - 1]; --at) best[at] = best[at - 1], ids[at] = ids[at - 1];
        best[at] = x, ids[at] = i;
    }
}

float sigmoid_of(float z) { return 1.0f / (1.0f + expf(-z)); }

// A softmax over logits.
struct Softmax {
    Softmax(const float* z, long n, float* exponentials) {
        for (long i = 0; i < n; ++i) peak = z[i] > peak ? z[i] : peak;
        for (long i = 0; i < n; ++i) sum += exponentials[i] = expf(z[i] - peak);
    }
    float of(float z) const { return expf(z - peak) / (float)sum; }

    float peak = NEG;
    double sum = 0;
};

class Router {
   public:
    explicit Router(const RouteCall& call) : c(call), shared_count(call.logits - call.experts) {}

    int run() {
        if (!place(arena, [&](Cut& cut) { lay_out(cut); })) return 1;
        tokens_a_task = 1 + LOGITS_A_TASK / c.logits;
        rule.count = (c.tokens + tokens_a_task - 1) / tokens_a_task;
        arrange.count = c.gate ? c.tokens : 0;
        product.count = c.gate ? (c.logits + GATE_ROWS - 1) / GATE_ROWS : 0;
        const double reads = c.logits * (c.gate ? c.hidden : 0.0) + 4.0 * c.tokens * c.logits;
        run_threads([](void* router) { ((Router*)router)->work(); }, this, least(c.threads, 1 + (long)(reads / READS_A_THREAD)), c.fork);
        return outside ? 3 : 0;
    }

   private:
    struct Scratch {
        float *z, *key;  // [logits]
        float* best;     // [top_k], or [groups]
        vf* acc;
    };

    const RouteCall& c;
    const long shared_count;
    long tokens_a_task = 0, pitch = 0;
    float *x, *logits;
    const float** x_rows;
    char* scratch;
    size_t scratch_size;
    Tasks arrange, product, rule;
    std::atomic<long> joined{0};
    std::atomic<bool> outside{false};  // an id that was given is of no expert

    void lay_out(Cut& cut) {
        pitch = up_to(c.hidden, 2 * LANES) + 16;
        x = cut.take<float>(c.gate ? c.tokens * pitch : 0);
        x_rows = cut.take<const float*>(c.gate ? c.tokens : 0);
        logits = cut.take<float>(c.gate ? c.tokens * c.logits : 0);
        Cut one = {nullptr, 0};
        lay_out_scratch(one);
        scratch_size = one.used;
        scratch = cut.take<char>(scratch_size * c.threads);
    }

    Scratch lay_out_scratch(Cut& cut) const {
        Scratch s;
        s.z = cut.take<float>(c.logits), s.key = cut.take<float>(c.logits);
        s.best = cut.take<float>(c.top_k > c.groups ? c.top_k : c.groups);
        s.acc = cut.take<vf>(c.gate ? (c.tokens + MAX_T) * (GATE_ROWS + MAX_R) + LANES : 0);
        return s;
    }

    void work() {
        Cut cut = {scratch + scratch_size * joined.fetch_add(1), 0};
        const Scratch s = lay_out_scratch(cut);
        if (c.gate) switch (c.gate_dtype) {
            case FLOAT32: gate<Float>(s); break;
            case BFLOAT16: gate<Bfloat>(s); break;
            case FLOAT16: gate<Half>(s); break;
        }
        rule.each([&](long task, long) {
            const long end = least((task + 1) * tokens_a_task, c.tokens);
            for (long t = task * tokens_a_task; t < end; ++t) token(t, s);
        });
    }

    template <class K>
    void gate(const Scratch& s) {
        typedef typename K::elem elem;
        arrange.each([&](long t, long) {
            arrange_row<K>(x + t * pitch, (const char*)c.x + t * c.x_row * size_of(c.x_dtype), c.x_dtype, c.hidden);
            x_rows[t] = x + t * pitch;
        });
        product.each([&](long task, long next) {
            const long first = task * GATE_ROWS, n = least(GATE_ROWS, c.logits - first);
            const elem *rows = (const elem*)c.gate + first * c.gate_row, *then = (const elem*)c.gate + next * GATE_ROWS * c.gate_row;
            Soon soon = {nullptr, 0, 0};
            if (next < product.count) soon = {(const char*)then, c.gate_row * (long)sizeof(elem), c.hidden * (long)sizeof(elem)};
            Product<K>{rows, c.gate_row, n, c.hidden, x_rows, c.tokens, logits + first, c.logits, s.acc, soon}.run();
        });
    }

    // Logits of a token, scaled and capped.
    void logits_of(long t, float* z) const {
        const float scale = (float)c.scale, cap = (float)c.softcap;
        for (long i = 0; i < c.logits; ++i) {
            if (c.gate)
                z[i] = logits[t * c.logits + i] + (c.gate_bias ? c.gate_bias[i] : 0.0f);
            else
                z[i] = to_float(c.x, t * c.x_row + i * c.x_column, c.x_dtype);
            if (scale != 1.0f) z[i] *= scale;
            if (cap) z[i] = cap * tanhf(z[i] / cap);
        }
    }

    bool foreign(long t, long expert) const { return c.types && expert / (c.experts / c.sets) != c.types[t]; }

    // Scores that are a function of a logit alone.
    float alone(float z) const {
        if (c.score == SQRTSOFTPLUS) return sqrtf(z > 20.0f ? z : log1pf(expf(z)));
        return sigmoid_of(z);
    }

    // What experts are chosen by.
    void keys_of(long t, const Scratch& s) const {
        for (long e = 0; e < c.experts; ++e) {
            if (c.by_logit)
                s.key[e] = s.z[e];
            else if (c.score != SOFTMAX)
                s.key[e] = alone(s.z[e]);
            if (c.selection_bias) s.key[e] += c.selection_bias[e];
            if (foreign(t, e)) s.key[e] = NEG;
        }
        if (c.groups > 1) keep_groups(s);
    }

    // Keys of the groups that lose become `fill`. A group is kept if fewer than `kept` are above it, or equal and before it.
    void keep_groups(const Scratch& s) const {
        const long size = c.experts / c.groups;
        for (long g = 0; g < c.groups; ++g) {
            int64_t ids[2];
            float best[2] = {NEG, NEG};
            largest(s.key + g * size, size, least(size, 2), ids, best);
            const float score = c.best_two ? best[0] + best[1] : best[0];
            s.best[g] = score == score ? score : NEG;
        }
        for (long g = 0; g < c.groups; ++g) {
            long above = 0;
            for (long o = 0; o < c.groups; ++o) above += s.best[o] > s.best[g] || (s.best[o] == s.best[g] && o < g);
            for (long e = g * size; above >= c.kept && e < (g + 1) * size; ++e) s.key[e] = (float)c.fill;
        }
    }

    // Sparsemixer's weight of one expert: a softmax over what is left and lies close to it.
    float close_to(long expert, long without, const Scratch& s) const {
        const float top = s.z[expert];
        for (long e = 0; e < c.experts; ++e) {
            const float z = s.z[e], size = fabsf(z) < top ? top : fabsf(z);
            s.key[e] = e == without || (top - z) / size > (float)(2 * c.jitter) ? NEG : z;
        }
        const Softmax all(s.key, c.experts, s.key);
        return all.of(top);
    }

    void token(long t, const Scratch& s) {
        int64_t* ids = c.ids + t * c.top_k;
        float *weights = c.weights + t * c.top_k, *shared = c.shared + t * shared_count;
        logits_of(t, s.z);
        for (long e = 0; e < c.experts; ++e)
            if (foreign(t, e)) s.z[e] = NEG;
        Softmax all(s.z, c.score == SOFTMAX ? c.experts : 0, s.key);
        if (c.score == SOFTMAX && !c.by_logit)
            for (long e = 0; e < c.experts; ++e) s.key[e] /= (float)all.sum;
        if (c.given) {
            for (long k = 0; k < c.top_k; ++k) {
                ids[k] = c.given[t * c.top_k + k];
                if (ids[k] < 0 || ids[k] >= c.experts) {
                    outside = true;
                    return;
                }
            }
        } else {
            keys_of(t, s);
            largest(s.key, c.experts, c.top_k, ids, s.best);
        }
        if (c.score == SPARSEMIXER) {
            weights[0] = close_to(ids[0], -1, s);
            weights[1] = close_to(ids[1], ids[0], s);
        } else if (c.score == SOFTMAX_TOPK) {
            for (long k = 0; k < c.top_k; ++k) s.best[k] = s.z[ids[k]];
            const Softmax chosen(s.best, c.top_k, weights);
            for (long k = 0; k < c.top_k; ++k) weights[k] /= (float)chosen.sum;
        } else {
            for (long k = 0; k < c.top_k; ++k) weights[k] = c.score == SOFTMAX ? all.of(s.z[ids[k]]) : alone(s.z[ids[k]]);
        }
        for (long i = 0; i < shared_count; ++i) shared[i] = sigmoid_of(s.z[c.experts + i]);
        const float size = renormaliser(weights, shared), global = c.global_scale ? *c.global_scale : 1.0f, factor = (float)c.factor;
        for (long k = 0; k < c.top_k; ++k) {
            if (c.renormalise != NONE) weights[k] /= size;
            if (c.expert_scale) weights[k] *= c.expert_scale[ids[k]];
            weights[k] = weights[k] * global * factor;
        }
        for (long i = 0; i < shared_count; ++i) {
            if (c.renormalise != NONE) shared[i] /= size;
            shared[i] = shared[i] * global * factor;
        }
    }

    // What all weights of a token are divided by.
    float renormaliser(const float* weights, const float* shared) const {
        if (c.renormalise == NONE) return 1.0f;
        double sum = 0;
        auto add = [&](float w) { sum += c.renormalise == P_NORM ? pow(w, c.p) : w; };
        for (long k = 0; k < c.top_k; ++k) add(weights[k]);
        for (long i = 0; i < shared_count; ++i) add(shared[i]);
        if (c.renormalise == P_NORM) return (float)pow(sum, 1 / c.p);
        const float total = (float)sum, eps = (float)c.eps;
        if (c.renormalise == SUM) return total + eps;
        return total < eps ? eps : total;  // NaN stays
    }
};

}  // namespace

extern "C" {

// Returns 0; 1 where there is no memory; 3 where an id that was given is of no expert.
__attribute__((visibility("default"))) int moerunner_route(const RouteCall* call) { return Router(*call).run(); }

}  // extern "C"

// Runs the experts' kernels on random small layers and holds them against plain loops in double, and the router's on random rules,
// whose ids must be distinct, and linear layers. Compiled with sanitizers, which see every read beside a tensor: each tensor is its own allocation, of
// exactly its size, at an address that is not aligned.
//
//     driver SEED LAYERS      exits with 1 after a line for each layer that is wrong

#include "../../src/moerunner/kernels/cpu/experts.cpp"
#include "../../src/moerunner/kernels/cpu/linear.cpp"
#include "../../src/moerunner/kernels/cpu/route.cpp"

#include <math.h>
#include <stdio.h>
#if defined(TILES) && !defined(EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <random>
#include <vector>

static std::mt19937 engine;

static int pick_number(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
static double normal() { return std::normal_distribution<double>()(engine); }
static bool coin() { return pick_number(0, 1); }

// Numbers of one dtype, and the values that they stand for.
struct Numbers {
    std::vector<double> value;
    char* memory = nullptr;
    char* at = nullptr;

    Numbers(long count, int dtype, double scale) : value(count) {
        const size_t size = dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2, shift = dtype == FLOAT32 ? 4 : size;
        memory = (char*)malloc(count * size + shift);
        at = memory + shift;
        for (long i = 0; i < count; ++i) set(i, dtype, normal() * scale);
    }
    Numbers(const Numbers&) = delete;
    ~Numbers() { free(memory); }

    void set(long i, int dtype, double x) {
        float f = (float)x;
        uint32_t u;
        memcpy(&u, &f, 4);
        if (dtype == BFLOAT16) {
            uint16_t h = (uint16_t)(u >> 16);
            memcpy(at + 2 * i, &h, 2);
            u &= 0xffff0000u;
            memcpy(&f, &u, 4);
        } else if (dtype == FLOAT16) {  // cut to 10 bits; far too small ones to zero
            int exponent = (int)(u >> 23 & 255) - 127 + 15;
            uint16_t h = (uint16_t)(u >> 16 & 0x8000);
            if (exponent > 0 && exponent < 31)
                h |= (uint16_t)(exponent << 10 | (u >> 13 & 0x3ff)), u &= 0xffffe000u;
            else
                u = 0;
            memcpy(at + 2 * i, &h, 2);
            memcpy(&f, &u, 4);
        } else if (dtype == INT8) {
            int8_t q = (int8_t)fmax(-127, fmin(127, x * 40));
            memcpy(at + i, &q, 1);
            f = q;
        } else {
            memcpy(at + 4 * i, &f, 4);
        }
        value[i] = f;
    }
};

static double nonlinear(const Call& c, double g) {
    double head = c.gate_softcap ? c.gate_softcap * tanh(g / c.gate_softcap) : g;
    switch (c.kind) {
        case SILU: return head / (1 + exp(-c.alpha * g));
        case GELU: return 0.5 * g * (1 + erf(g * sqrt(0.5)));
        case GELU_TANH: return 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
        case RELU: return fmax(g, 0);
        default: return fmax(g, 0) * fmax(g, 0);
    }
}

static bool layer(int number) {
    Call c = {};
    const int dtypes[] = {FLOAT32, BFLOAT16, FLOAT16};
    c.x_dtype = dtypes[pick_number(0, 2)];
    c.w_dtype = coin() ? c.x_dtype : coin() ? INT8 : c.x_dtype;
    c.tokens = coin() ? pick_number(1, 5) : pick_number(6, 90);
    c.experts = pick_number(1, 6), c.top_k = pick_number(1, 4);
    c.hidden = coin() ? pick_number(1, 70) : pick_number(71, 2100), c.inter = coin() ? pick_number(1, 60) : pick_number(61, 130);
    if (c.hidden > 200 && c.tokens > 20) {
        if (coin())
            c.tokens = 20;
        else
            c.hidden = pick_number(257, 600);  // more than a slice
    }
    c.layout = pick_number(0, 2), c.kind = pick_number(0, 4), c.per_slot = coin(), c.rows = coin(), c.invariant = coin();
    c.alpha = c.kind == SILU && coin() ? 1.7 : 1, c.beta = coin() ? 0.5 : 0, c.limit = coin() ? 0.9 : INFINITY;
    c.gate_softcap = c.kind == SILU && coin() ? 1.2 : 0, c.up_softcap = coin() ? 1.1 : 0, c.clamp_after = coin();
    c.threads = pick_number(1, 3);
    static const int32_t node_of_cpu[] = {0, 1, 2};
    c.node_of_cpu = node_of_cpu, c.cpus = 3, c.nodes = pick_number(0, 3);
    const long w13_rows = c.layout == UNGATED ? c.inter : 2 * c.inter, slots = c.tokens * c.top_k;
    const bool across = coin();
    c.x_step = c.hidden + pick_number(0, 3);
    c.w13_column = across ? w13_rows : 1, c.w13_row = across ? 1 : c.hidden, c.w13_expert = w13_rows * c.hidden;
    c.w2_column = across ? c.hidden : 1, c.w2_row = across ? 1 : c.inter, c.w2_expert = c.hidden * c.inter;
    const long x_rows = c.per_slot ? slots : c.tokens;
    Numbers x((x_rows - 1) * c.x_step + c.hidden, (int)c.x_dtype, 1);
    Numbers w13(c.experts * w13_rows * c.hidden, (int)c.w_dtype, 1 / sqrt(c.hidden)), w2(c.experts * c.hidden * c.inter, (int)c.w_dtype, 1 / sqrt(c.inter));
    Numbers b13(c.experts * w13_rows, (int)c.x_dtype, 0.5), b2(c.experts * c.hidden, (int)c.x_dtype, 0.5);
    Numbers s13(c.experts * w13_rows, FLOAT32, 0.1), s2(c.experts * c.hidden, FLOAT32, 0.1);
    Numbers weights(slots, FLOAT32, 1), out((c.rows ? slots : c.tokens) * c.hidden, FLOAT32, NAN);
    std::vector<int64_t> ids(slots);
    for (int64_t& id : ids) id = pick_number(-1, (int)c.experts);  // experts itself is none of them
    const bool bias = coin(), scaled = c.w_dtype == INT8;
    c.x = x.at, c.ids = ids.data(), c.weights = coin() ? (float*)weights.at : nullptr, c.w13 = w13.at, c.w2 = w2.at;
    if (bias) c.b13 = b13.at, c.b2 = b2.at;
    if (scaled) c.w13_scale = (float*)s13.at, c.w2_scale = (float*)s2.at;
    c.out = (float*)out.at;
    if (moerunner_experts(&c)) return false;

    std::vector<double> exact(out.value.size(), 0.0), h(c.inter);
    for (long s = 0; s < slots; ++s) {
        const long e = ids[s], t = s / c.top_k;
        if (e < 0 || e >= c.experts) continue;
        auto product = [&](long row) {
            double sum = 0;
            for (long k = 0; k < c.hidden; ++k)
                sum += w13.value[e * c.w13_expert + row * c.w13_row + k * c.w13_column] * x.value[(c.per_slot ? s : t) * c.x_step + k];
            const long r = e * w13_rows + row;
            return sum * (scaled ? s13.value[r] : 1) + (bias ? b13.value[r] : 0);
        };
        for (long i = 0; i < c.inter; ++i) {
            double g = product(c.layout == INTERLEAVED ? 2 * i : i);
            h[i] = c.clamp_after ? fmin(nonlinear(c, g), c.limit) : nonlinear(c, fmin(g, c.limit));
            if (c.layout == UNGATED) continue;
            double u = fmax(fmin(product(c.layout == INTERLEAVED ? 2 * i + 1 : c.inter + i), c.limit), -c.limit);
            h[i] *= (c.up_softcap ? c.up_softcap * tanh(u / c.up_softcap) : u) + c.beta;
        }
        for (long n = 0; n < c.hidden; ++n) {
            double sum = 0;
            for (long i = 0; i < c.inter; ++i) sum += w2.value[e * c.w2_expert + n * c.w2_row + i * c.w2_column] * h[i];
            sum = sum * (scaled ? s2.value[e * c.hidden + n] : 1) + (bias ? b2.value[e * c.hidden + n] : 0);
            exact[(c.rows ? s : t) * c.hidden + n] += sum * (c.weights && !c.rows ? weights.value[s] : 1);
        }
    }
    double error = 0, largest = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
        const double difference = fabs(c.out[i] - exact[i]);
        error = difference <= error ? error : difference;  // NaN stays
        largest = fmax(largest, fabs(exact[i]));
    }
    const double allowed = c.w_dtype == BFLOAT16 ? 2e-2 : 2e-5;  // the middle is bfloat16 where pairs are multiplied
    if (error <= allowed * largest + 1e-30) return true;
    printf("layer %d: x %d, weights %d, %ld tokens, top %ld of %ld, %ld x %ld, layout %ld, kind %ld, across %d: error %g of %g\n", number,
           (int)c.x_dtype, (int)c.w_dtype, (long)c.tokens, (long)c.top_k, (long)c.experts, (long)c.hidden, (long)c.inter,
           (long)c.layout, (long)c.kind, across, error, largest);
    return false;
}

static bool routes(int number) {
    RouteCall c = {};
    const long members = pick_number(2, 40);
    c.groups = pick_number(1, 4), c.experts = c.groups * members, c.logits = c.experts + pick_number(0, 3);
    c.top_k = pick_number(2, (int)least(c.experts, 12)), c.kept = least(c.groups, (c.top_k + members - 1) / members);
    c.tokens = coin() ? pick_number(1, 5) : pick_number(6, 70), c.hidden = pick_number(1, 300), c.threads = pick_number(1, 3);
    c.score = pick_number(0, SPARSEMIXER), c.by_logit = c.score > SQRTSOFTPLUS || coin(), c.best_two = coin();
    c.renormalise = pick_number(0, P_NORM), c.scale = 1, c.softcap = coin() ? 2 : 0, c.fill = coin() ? 0 : -INFINITY;
    c.eps = 0.1, c.p = 2, c.jitter = 0.1, c.factor = 1.5, c.sets = 1;
    if (c.score == SPARSEMIXER) c.top_k = 2, c.logits = c.experts;
    const int dtypes[] = {FLOAT32, BFLOAT16, FLOAT16};
    const bool gate = coin();
    c.x_dtype = dtypes[pick_number(0, 2)], c.gate_dtype = dtypes[pick_number(0, 2)];
    const long width = gate ? c.hidden : c.logits;
    c.x_row = width + pick_number(0, 3), c.x_column = 1, c.gate_row = c.hidden + pick_number(0, 3);
    Numbers x((c.tokens - 1) * c.x_row + width, (int)c.x_dtype, 1), g((c.logits - 1) * c.gate_row + c.hidden, (int)c.gate_dtype, 0.1);
    Numbers bias(c.logits, FLOAT32, 1), selection(c.experts, FLOAT32, 1), scale(c.experts, FLOAT32, 1), all(1, FLOAT32, 1);
    std::vector<int64_t> ids(c.tokens * c.top_k, -1);
    Numbers weights(c.tokens * c.top_k, FLOAT32, NAN), shared(c.tokens * (c.logits - c.experts), FLOAT32, NAN);
    c.x = x.at, c.gate = gate ? g.at : nullptr, c.gate_bias = coin() ? (float*)bias.at : nullptr;
    c.selection_bias = coin() ? (float*)selection.at : nullptr, c.expert_scale = coin() ? (float*)scale.at : nullptr;
    c.global_scale = coin() ? (float*)all.at : nullptr;
    c.ids = ids.data(), c.weights = (float*)weights.at, c.shared = (float*)shared.at;
    bool right = moerunner_route(&c) == 0;
    for (long t = 0; t < c.tokens; ++t)
        for (long k = 0; k < c.top_k; ++k) {
            const int64_t* own = ids.data() + t * c.top_k;
            right = right && own[k] >= 0 && own[k] < c.experts && isfinite(c.weights[t * c.top_k + k]);
            for (long other = 0; other < k; ++other) right = right && own[k] != own[other];
        }
    for (long i = 0; i < c.tokens * (c.logits - c.experts); ++i) right = right && isfinite(c.shared[i]);
    if (!right) printf("route %d: %ld of %ld experts in %ld groups, score %ld, %ld tokens\n", number, (long)c.top_k, (long)c.experts, (long)c.groups, (long)c.score, (long)c.tokens);
    return right;
}

static bool linear_layer(int number) {
    LinearCall c = {};
    const int dtypes[] = {FLOAT32, BFLOAT16, FLOAT16};
    c.dtype = dtypes[pick_number(0, 2)], c.x_dtype = coin() ? c.dtype : FLOAT32, c.threads = pick_number(1, 3);
    c.tokens = pick_number(1, 64), c.width = coin() ? pick_number(1, 70) : pick_number(71, 1100), c.outputs = pick_number(1, 130);
    c.x_row = c.width + pick_number(0, 3), c.w_row = c.width + pick_number(0, 3);
    Numbers x((c.tokens - 1) * c.x_row + c.width, (int)c.x_dtype, 1), w((c.outputs - 1) * c.w_row + c.width, (int)c.dtype, 1);
    Numbers bias(c.outputs, (int)c.dtype, 1), out(c.tokens * c.outputs, FLOAT32, NAN);
    c.x = x.at, c.w = w.at, c.bias = coin() ? bias.at : nullptr, c.out = (float*)out.at;
    if (moerunner_linear(&c)) return false;
    for (long t = 0; t < c.tokens; ++t)
        for (long i = 0; i < c.outputs; ++i) {
            double sum = c.bias ? bias.value[i] : 0, size = fabs(sum);
            for (long k = 0; k < c.width; ++k) {
                const double product = x.value[t * c.x_row + k] * w.value[i * c.w_row + k];
                sum += product, size += fabs(product);
            }
            if (fabs(c.out[t * c.outputs + i] - sum) <= 1e-6 * size) continue;
            printf("linear %d: token %ld, output %ld: %g, not %g\n", number, t, i, c.out[t * c.outputs + i], sum);
            return false;
        }
    return true;
}

int main(int count, char** arguments) {
    engine.seed((unsigned)(count > 1 ? atoi(arguments[1]) : 0));
    const int layers = count > 2 ? atoi(arguments[2]) : 100;
#if defined(TILES) && !defined(EMULATED)
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 2;  // asks Linux for the tiles, as library.py does
#endif
    bool right = true;
    for (int i = 0; i < layers; ++i) right = layer(i) && linear_layer(i) && routes(i) && right;
    moerunner_release();
    return right && !moerunner_kept() ? 0 : 1;
}

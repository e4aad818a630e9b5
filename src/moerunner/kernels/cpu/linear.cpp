// Products of a few tokens with a matrix that is read once, out = x w^T + bias, in float32.

#include "dots.h"
#include "pool.h"

// Strides in elements; rows of the bias and of the output are contiguous. dtype: float32, bfloat16 or float16, of all but the tokens.
struct LinearCall {
    const void* x;     // [tokens][width]
    const void* w;     // [outputs][width]
    const void* bias;  // [outputs], null: none
    float* out;        // [tokens][outputs]
    int64_t tokens, width, outputs, x_row, w_row, x_dtype, dtype;
    int64_t threads;
    Fork fork;  // starts threads; null: own ones
};

namespace {

template <class K>
class Linear {
    typedef typename K::elem elem;
    typedef typename K::token token;

   public:
    explicit Linear(const LinearCall& call) : c(call), pitch(up_to(call.width, K::STEP) + 16) {}

    int run() {
        if (!place(arena, [&](Cut& cut) { lay_out(cut); })) return 1;
        arrange.count = c.tokens;
        product.count = (c.outputs + MAX_ROWS - 1) / MAX_ROWS;
        const double reads = (double)c.outputs * c.width;
        run_threads([](void* linear) { ((Linear*)linear)->work(); }, this, least(c.threads, 1 + (long)(reads / READS_A_THREAD)), c.fork);
        return 0;
    }

   private:
    const LinearCall& c;
    const long pitch;
    token* x;
    const token** x_rows;
    vf* acc;
    Tasks arrange, product;
    std::atomic<long> joined{0};

    long acc_size() const { return (c.tokens + MAX_T) * (MAX_ROWS + MAX_R) + LANES; }

    void lay_out(Cut& cut) {
        x = cut.take<token>(c.tokens * pitch);
        x_rows = cut.take<const token*>(c.tokens);
        acc = cut.take<vf>(acc_size() * c.threads);
    }

    void work() {
        vf* own = acc + acc_size() * joined.fetch_add(1);
        arrange.each([&](long t, long) {
            x_rows[t] = x + t * pitch;
            arrange_row<K>(x + t * pitch, (const char*)c.x + t * c.x_row * size_of(c.x_dtype), c.x_dtype, c.width);
        });
        product.each([&](long task, long next) {
            const long first = task * MAX_ROWS, n = least(MAX_ROWS, c.outputs - first), size = sizeof(elem);
            const elem* w = (const elem*)c.w;
            Soon soon = {nullptr, 0, 0};
            if (next < product.count) soon = {(const char*)(w + next * MAX_ROWS * c.w_row), c.w_row * size, c.width * size};
            Product<K>{w + first * c.w_row, c.w_row, n, c.width, x_rows, c.tokens, c.out + first, c.outputs, own, soon}.run();
            for (long t = 0; c.bias && t < c.tokens; ++t)
                for (long i = first; i < first + n; ++i) c.out[t * c.outputs + i] += to_float(c.bias, i, c.dtype);
        });
    }
};

}  // namespace

extern "C" {

// Returns 0; 1 where there is no memory; 2 for numbers of a kind that it does not know.
__attribute__((visibility("default"))) int moerunner_linear(const LinearCall* call) {
    switch (call->dtype) {
        case FLOAT32: return Linear<Float>(*call).run();
        case BFLOAT16:
#ifdef PAIRS
            if (call->x_dtype == BFLOAT16) return Linear<Pairs>(*call).run();  // it would round any other tokens to bfloat16
#endif
            return Linear<Bfloat>(*call).run();
        case FLOAT16: return Linear<Half>(*call).run();
    }
    return 2;
}

}  // extern "C"

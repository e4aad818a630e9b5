// RMS norm of rows in float32 or bfloat16, rounded where Transformers' own code rounds: x / sqrt(mean(x^2) + eps) in float32.

#include <math.h>

#include "pool.h"
#include "vectors.h"

// Strides in elements; rows of the output and the weight are contiguous.
struct NormCall {
    const void* x;       // [rows][width]
    const void* weight;  // [width]
    void* out;           // [rows][width]
    int64_t rows, width, x_row, dtype;
    int64_t form;  // 0: weight * rounded, 1: rounded(weight * x), 2: rounded((1 + weight) * x)
    double eps;
    int64_t threads;
    Fork fork;  // starts threads; null: own ones
};

namespace {

constexpr long NUMBERS_A_TASK = 16384;

class Norm {
   public:
    explicit Norm(const NormCall& call) : c(call), rows_a_task(1 + NUMBERS_A_TASK / call.width) {
        tasks.count = (c.rows + rows_a_task - 1) / rows_a_task;
    }

    void run() {
        const double reads = 3.0 * c.rows * c.width;
        run_threads([](void* norm) { ((Norm*)norm)->work(); }, this, least(c.threads, 1 + (long)(reads / READS_A_THREAD)), c.fork);
    }

   private:
    const NormCall& c;
    const long rows_a_task;
    Tasks tasks;

    void work() {
        tasks.each([&](long task, long) {
            const long end = least((task + 1) * rows_a_task, c.rows), size = size_of(c.dtype);
            for (long r = task * rows_a_task; r < end; ++r)
                row((const char*)c.x + r * c.x_row * size, (char*)c.out + r * c.width * size);
        });
    }

    static vf rounded(vf y, long dtype) { return dtype == FLOAT32 ? y : (vf)(narrow_bfloat(y) << 16); }

    vf read(const void* p, long i) const {
        if (i + LANES <= c.width) return to_floats(p, i, c.dtype);
        float some[LANES] = {};
        for (long l = 0; i + l < c.width; ++l) some[l] = to_float(p, i + l, c.dtype);
        return load<vf>(some);
    }

    void write(void* p, long i, vf y) const {
        const vh half = __builtin_convertvector(narrow_bfloat(y), vh);
        const void* numbers = c.dtype == FLOAT32 ? (const void*)&y : (const void*)&half;
        const long size = size_of(c.dtype);
        memcpy((char*)p + i * size, numbers, least(LANES, c.width - i) * size);
    }

    void row(const char* x, char* out) const {
        vf squares = {};
        for (long i = 0; i < c.width; i += LANES) {
            const vf v = read(x, i);
            squares += v * v;
        }
        double sum = 0;
        for (long l = 0; l < LANES; ++l) sum += squares[l];
        const float scale = 1.0f / sqrtf((float)(sum / c.width) + (float)c.eps);
        for (long i = 0; i < c.width; i += LANES) {
            const vf weight = read(c.weight, i), y = read(x, i) * scale;
            write(out, i, c.form == 0 ? rounded(y, c.dtype) * weight : c.form == 1 ? y * weight : y * (1.0f + weight));
        }
    }
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void moerunner_rms_norm(const NormCall* call) { Norm(*call).run(); }

}  // extern "C"

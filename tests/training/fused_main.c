/* Prints what each function of fused.c makes of random numbers, at sizes that fit no tile: a name and its
   numbers in a line. For processors that this machine is not (test_fused.py). The argument: how many threads. */

#include <stdio.h>

#include "../../shared/training/fused.c"

enum { ROWS = 67, INPUTS = 35, OUTPUTS = 21 };
enum { BATCH = 2, TIME = 37, HEADS = 4, KV_HEADS = 2, DIM = 18, ROPE = 8 };

/* Which of the numbers in one initializer is drawn first, the compiler may choose: so only one is. */
static unsigned state = 1;
static float *numbers(long count) {
    float *all = malloc((size_t)count * sizeof(float));
    for (long i = 0; i < count; i++) {
        state = state * 1664525 + 1013904223;
        all[i] = (float)(state >> 8) / (1 << 23) - 1;
    }
    return all;
}

static void print(const char *what, const float *values, long count) {
    printf("%s:", what);
    for (long i = 0; i < count; i++) printf(" %a", (double)values[i]);
    printf("\n");
}

static int linear_layer(int threads) {
    const float *x = numbers(ROWS * INPUTS), *weight = numbers(OUTPUTS * INPUTS);
    const float *dy = numbers(ROWS * OUTPUTS), *bias = numbers(OUTPUTS);
    float *y = numbers(ROWS * OUTPUTS), *dx = numbers(ROWS * INPUTS), *d_weight = numbers(OUTPUTS * INPUTS);
    float *d_bias = numbers(OUTPUTS), *sum = numbers(ROWS * OUTPUTS);
    int failed = linear(x, weight, bias, NULL, ROWS, INPUTS, OUTPUTS, y, threads);
    failed |= linear(x, weight, bias, dy, ROWS, INPUTS, OUTPUTS, sum, threads);
    failed |= linear_backward_input(dy, weight, ROWS, INPUTS, OUTPUTS, dx, 0, threads);
    failed |= linear_backward_weight(dy, x, ROWS, INPUTS, OUTPUTS, d_weight, threads);
    linear_backward_bias(dy, ROWS, OUTPUTS, d_bias, threads);
    print("linear", y, ROWS * OUTPUTS);
    print("linear, added", sum, ROWS * OUTPUTS);
    print("linear backward, bias", d_bias, OUTPUTS);
    print("linear backward, input", dx, ROWS * INPUTS);
    print("linear backward, weight", d_weight, OUTPUTS * INPUTS);
    return failed;
}

static int muon_step(int threads) {
    static const long sizes[][2] = {{1, 1}, {1, 6}, {33, 32}, {40, 130}, {130, 40}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    muon_matrix matrices[COUNT];
    for (int i = 0; i < COUNT; i++) {
        const long rows = sizes[i][0], columns = sizes[i][1], size = rows * columns;
        matrices[i] = (muon_matrix){.rows = rows, .columns = columns};
        matrices[i].parameter = numbers(size);
        matrices[i].gradient = numbers(size);
        matrices[i].momentum = numbers(size);
    }
    const int failed = muon(COUNT, matrices, 5, 0.02f, 0.9f, 0.1f, threads);
    for (int i = 0; i < COUNT; i++) {
        print("muon, parameter", matrices[i].parameter, sizes[i][0] * sizes[i][1]);
        print("muon, momentum", matrices[i].momentum, sizes[i][0] * sizes[i][1]);
    }
    return failed;
}

static int activations_and_norms(int threads) {
    enum { SIZE = ROWS * INPUTS };
    const float *gate = numbers(SIZE), *up = numbers(SIZE), *dy = numbers(SIZE), *weight = numbers(INPUTS);
    float *y = numbers(SIZE), *more = numbers(SIZE), *d_weight = numbers(INPUTS), *d_bias = numbers(INPUTS);
    int failed = 0;
    gated_silu(gate, up, SIZE, y, threads);
    print("gated SiLU", y, SIZE);
    gated_silu_backward(gate, up, dy, SIZE, more, y, threads);
    print("gated SiLU backward, gate", more, SIZE);
    print("gated SiLU backward, up", y, SIZE);
    for (int by_tanh = 0; by_tanh < 2; by_tanh++) {
        gelu(gate, SIZE, by_tanh, y, more, threads);
        print(by_tanh ? "GELU by tanh" : "GELU", y, SIZE);
        print(by_tanh ? "GELU by tanh, slope" : "GELU, slope", more, SIZE);
    }
    for (int centered = 0; centered < 2; centered++) {
        norm(up, weight, centered ? dy : NULL, ROWS, INPUTS, 1e-5f, centered, y, threads);
        print(centered ? "LayerNorm" : "RMSNorm", y, SIZE);
        failed |= norm_backward(up, weight, dy, gate, ROWS, INPUTS, 1e-5f, centered, y, d_weight,
                                centered ? d_bias : NULL, threads);
        print(centered ? "LayerNorm backward, input" : "RMSNorm backward, input", y, SIZE);
        print(centered ? "LayerNorm backward, weight" : "RMSNorm backward, weight", d_weight, INPUTS);
    }
    print("LayerNorm backward, bias", d_bias, INPUTS);
    return failed;
}

static int attention_layer(int threads) {
    enum { Q = BATCH * TIME * HEADS * DIM, KV = BATCH * TIME * KV_HEADS * DIM, TASKS = BATCH * KV_HEADS };
    const float *q = numbers(Q), *k = numbers(KV), *v = numbers(KV), *d_out = numbers(Q);
    const float *q_weight = numbers(DIM), *k_weight = numbers(DIM);
    const float *cosines = numbers(TIME * ROPE), *sines = numbers(TIME * ROPE);
    const attention_input in = {BATCH, TIME, HEADS, KV_HEADS, DIM, ROPE, 11, q, k, v,
                                q_weight, k_weight, cosines, sines, 1e-5f, 0.25f};
    float *out = zeros(Q), *log_sums = zeros(BATCH * HEADS * TIME), *d_q = zeros(Q), *d_k = zeros(KV);
    float *d_v = zeros(KV);
    int failed = attention(&in, out, log_sums, threads);
    const attention_gradients g = {out, log_sums, d_out, d_q, d_k, d_v, zeros(TASKS * DIM),
                                   zeros(TASKS * DIM)};
    failed |= attention_backward(&in, &g, threads);
    print("attention", out, Q);
    print("attention, log sums", log_sums, BATCH * HEADS * TIME);
    print("attention backward, queries", d_q, Q);
    print("attention backward, keys", d_k, KV);
    print("attention backward, values", d_v, KV);
    print("attention backward, norm of queries", g.d_q_weights, TASKS * DIM);
    print("attention backward, norm of keys", g.d_k_weights, TASKS * DIM);
    return failed;
}

int main(int count, char **arguments) {
    const int threads = count > 1 ? atoi(arguments[1]) : 1;
    int failed = linear_layer(threads);
    failed |= muon_step(threads);
    failed |= activations_and_norms(threads);
    failed |= attention_layer(threads);
    return failed;
}

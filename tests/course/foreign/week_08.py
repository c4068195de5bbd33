"""Answers to week 8's product in C with scales for groups, written in other ways than the grader's own."""

from tests.course.foreign.register import right, wrong

HEAD = """
#include <stdint.h>

void grouped_matvec(const int8_t *w, const float *w_scale, const int8_t *x,
                    const float *x_scale, float *y, int rows, int columns) {
"""


@wrong("The activations' scale is chosen by the row, not by the group.")
def grouped_dot_source():
    return f"""{HEAD}
    int n = columns / 32;
    for (int row = 0; row < rows; row++) {{
        y[row] = 0;
        for (int g = 0; g < n; g++) {{
            int32_t sum = 0;
            for (int i = 0; i < 32; i++)
                sum += w[row * columns + 32 * g + i] * x[32 * g + i];
            y[row] += sum * w_scale[row * n + g] * x_scale[row % n];
        }}
    }}
}}
"""


@wrong("The product of two codes is cut to a byte before it is added.")
def grouped_dot_source():
    return f"""{HEAD}
    for (int r = 0; r < rows; ++r) {{
        float out = 0.0f;
        for (int c = 0; c < columns; c += 32) {{
            int acc = 0;
            for (int k = c; k < c + 32; ++k) {{
                int8_t p = w[r * columns + k] * x[k];
                acc += p;
            }}
            out += acc * w_scale[r * (columns / 32) + c / 32] * x_scale[c / 32];
        }}
        y[r] = out;
    }}
}}
"""


@wrong("The scales are added, not multiplied.")
def grouped_dot_source():
    return f"""{HEAD}
    int n = columns / 32;
    for (int r = 0; r < rows; r++) {{
        float out = 0;
        for (int g = 0; g < n; g++) {{
            int32_t sum = 0;
            for (int i = 0; i < 32; i++) sum += w[(r * n + g) * 32 + i] * x[g * 32 + i];
            out += sum * (w_scale[r * n + g] + x_scale[g]);
        }}
        y[r] = out;
    }}
}}
"""


@wrong("Groups of 16: half of each group is left out.")
def grouped_dot_source():
    return f"""{HEAD}
    for (int r = 0; r < rows; r++) {{
        float out = 0;
        for (int g = 0; g < columns / 32; g++) {{
            int32_t sum = 0;
            for (int i = 0; i < 16; i++)
                sum += w[r * columns + g * 32 + i] * x[g * 32 + i];
            out += sum * w_scale[r * (columns / 32) + g] * x_scale[g];
        }}
        y[r] = out;
    }}
}}
"""


@wrong("The weight's scale is applied once a row, behind the loop over the groups.")
def grouped_dot_source():
    return f"""{HEAD}
    int n = columns / 32;
    for (int r = 0; r < rows; r++) {{
        float out = 0;
        for (int g = 0; g < n; g++) {{
            int32_t sum = 0;
            for (int i = 0; i < 32; i++) sum += w[r * columns + g * 32 + i] * x[g * 32 + i];
            out += sum * x_scale[g];
        }}
        y[r] = out * w_scale[r * n];
    }}
}}
"""


@wrong("Adds into y, which holds anything before the call.")
def grouped_dot_source():
    return f"""{HEAD}
    int n = columns / 32;
    for (int at = 0; at < rows * n; at++) {{
        int32_t sum = 0;
        for (int i = 0; i < 32; i++) sum += w[at * 32 + i] * x[at % n * 32 + i];
        y[at / n] += sum * w_scale[at] * x_scale[at % n];
    }}
}}
"""


@wrong("No semicolon.")
def grouped_dot_source():
    return f"{HEAD} y[0] = 0 }}"


@right
def grouped_dot_source():
    return f"""#include <string.h>
{HEAD}
    int n = columns / 32;
    memset(y, 0, rows * sizeof *y);
    for (int g = 0; g < n; g++)
        for (int r = 0; r < rows; r++) {{
            int sum = 0;
            const int8_t *a = w + (long)r * columns + 32 * g, *b = x + 32 * g, *end = b + 32;
            while (b < end) sum += *a++ * *b++;
            y[r] += (w_scale[r * n + g] * sum) * x_scale[g];
        }}
}}
"""

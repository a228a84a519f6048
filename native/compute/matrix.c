#include "compute/matrix.h"

#include <string.h>

/* ggml's struct ggml_type_traits_cpu, as declared by the ggml of llama-cpp-python 0.3.36; engine.py has looked at it. */
typedef struct {
    gp_from_float from_float;
    gp_vec_dot    vec_dot;
    int32_t       vec_dot_type;
    int64_t       nrows;
} type_traits;

bool gp_matrix_find(gp_matrix *m, const gp_ggml *ggml, int32_t type, int64_t n_columns, int64_t n_rows) {
    const type_traits *weights = ggml->cpu_traits ? ggml->cpu_traits(type) : NULL;
    if (!weights || !weights->vec_dot) {
        return false;
    }
    const int64_t block = ggml->block_size(weights->vec_dot_type);
    if (block <= 0 || n_columns % block != 0) {
        return false;
    }
    *m = (gp_matrix) { .type = type, .input_type = weights->vec_dot_type, .n_columns = n_columns, .n_rows = n_rows,
                       .vec_dot = weights->vec_dot,
                       .input_bytes = (size_t) (n_columns / block) * ggml->type_size(weights->vec_dot_type) };
    if (weights->vec_dot_type != ggml->type_f32) {
        m->from_float = ((const type_traits *) ggml->cpu_traits(weights->vec_dot_type))->from_float;
    }
    return m->from_float || weights->vec_dot_type == ggml->type_f32;
}

void gp_matrix_convert(const gp_matrix *m, const float *input, char *converted) {
    if (m->from_float) {
        m->from_float(input, converted, m->n_columns);
    } else {
        memcpy(converted, input, m->input_bytes);
    }
}

void gp_matrix_dot(const gp_matrix *m, const gp_matrix_part *part, const char *input, float *result) {
    for (int64_t i = part->first; i < part->end; i++) {
        m->vec_dot((int) m->n_columns, &result[i], 0, part->data + (size_t) i * part->row_bytes, 0, input, 0, 1);
    }
}

/* Matrices of one type and size, ggml's functions for them, and two ways to multiply rows with a part of one. Both give the bits
 * of ggml's MUL_MAT_ID, or are not used: which of them does is tried once per kind (trial.h). */
#ifndef GGUF_PAGER_MATRIX_H
#define GGUF_PAGER_MATRIX_H

#include "compute/ggml_tensor.h"
#include "gguf_pager.h"

typedef struct {
    int32_t       type, input_type;
    int64_t       n_columns, n_rows;
    gp_from_float from_float;       /* to the type that inputs are multiplied in; NULL: that is f32, as they are */
    gp_vec_dot    vec_dot;
    size_t        input_bytes;      /* of an input in that type */
} gp_matrix;

/* Asks ggml for its functions. False: it cannot multiply these, or not in a way that is known here. */
bool gp_matrix_find(gp_matrix *matrix, const gp_ggml *ggml, int32_t type, int64_t n_columns, int64_t n_rows);

/* An input in the type that it is multiplied in. */
void gp_matrix_convert(const gp_matrix *matrix, const float *input, char *converted);

/* A part of an expert's matrix: rows first to end of it. */
typedef struct {
    const char *data;               /* of the whole matrix */
    size_t      row_bytes;
    int64_t     first, end;
} gp_matrix_part;

/* By ggml's product of two vectors. */
void gp_matrix_dot(const gp_matrix *matrix, const gp_matrix_part *part, const char *input, float *result);

#endif

/* The part of ggml's struct ggml_tensor that the tap reads and writes, as declared by the ggml of llama-cpp-python
 * 0.3.36. Its layout is not promised by ggml: engine.py compares every field with what ggml's own functions say before
 * the first tap is opened, and refuses to go on when one differs. */
#ifndef GGUF_PAGER_GGML_TENSOR_H
#define GGUF_PAGER_GGML_TENSOR_H

#include <stddef.h>
#include <stdint.h>

enum { GGML_DIMS = 4, GGML_SOURCES = 10, GGML_OP_PARAMS_BYTES = 64, GGML_NAME_BYTES = 64 };

typedef struct ggml_tensor ggml_tensor;
struct ggml_tensor {
    int32_t      type;
    void        *buffer;
    int64_t      ne[GGML_DIMS];
    size_t       nb[GGML_DIMS];
    int32_t      op;
    int32_t      op_params[GGML_OP_PARAMS_BYTES / sizeof(int32_t)];
    int32_t      flags;
    ggml_tensor *src[GGML_SOURCES];
    ggml_tensor *view_src;
    size_t       view_offs;
    void        *data;
    char         name[GGML_NAME_BYTES];
    void        *extra;
    char         padding[8];
};

#endif

/* gguf_pager._native.Pager, continued: what it has counted, and which experts are there. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>

PyObject *gp_pager_object_counters(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = gp_pager_object_opened(self);
    if (!pager) {
        return NULL;
    }
    gp_counters *counters = calloc(self->n_layers + 1, sizeof *counters);
    if (!counters) {
        return PyErr_NoMemory();
    }
    gp_pager_counters(pager, counters);
    PyObject *list = PyList_New(self->n_layers);
    for (uint32_t i = 0; list && i < self->n_layers; i++) {
        const gp_counters *c = &counters[i];
        PyObject *row = Py_BuildValue("(KKKKKKKKKKKKII)", c->hits, c->misses, c->bytes_read, c->bytes_wasted, c->stall_ns, c->stall_bytes,
                                      c->evictions, c->left_alone, c->visits, c->tokens, c->foreseen,
                                      c->in_vain, (unsigned int) c->sight, c->resident);
        if (!row) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, i, row);
        }
    }
    free(counters);
    return list;
}

PyObject *gp_pager_object_copies(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = gp_pager_object_opened(self);
    if (!pager) {
        return NULL;
    }
    uint64_t bytes_read[GP_MAX_COPIES];
    gp_pager_copies(pager, bytes_read);
    PyObject *list = PyList_New(self->n_copies);
    for (uint32_t i = 0; list && i < self->n_copies; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(bytes_read[i]);
        if (!number || PyList_SetItem(list, i, number) != 0) {  /* which takes the number, also when it fails */
            Py_CLEAR(list);
        }
    }
    return list;
}

PyObject *gp_pager_object_rows(PyObject *object, PyObject *unused) {
    (void) unused;
    const gp_pager *pager = gp_pager_object_opened((PagerObject *) object);
    if (!pager) {
        return NULL;
    }
    gp_row_counters counters;
    gp_pager_row_counters(pager, &counters);
    return Py_BuildValue("KKK", counters.rows_read, counters.bytes_read, counters.left_alone);
}

/* NULL with the error set: closed, no number, or no such layer. */
static gp_pager *opened_for_layer(PagerObject *self, PyObject *args, unsigned int *layer) {
    gp_pager *pager = gp_pager_object_opened(self);
    if (!pager || !PyArg_ParseTuple(args, "I", layer)) {
        return NULL;
    }
    if (*layer >= self->n_layers) {
        gp_error_raise(-EINVAL);
        return NULL;
    }
    return pager;
}

PyObject *gp_pager_object_resident(PyObject *object, PyObject *args) {
    PagerObject *self = (PagerObject *) object;
    unsigned int layer;
    gp_pager *pager = opened_for_layer(self, args, &layer);
    if (!pager) {
        return NULL;
    }
    uint8_t *resident = malloc(self->n_experts[layer]);
    if (!resident) {
        return PyErr_NoMemory();
    }
    const int error = gp_pager_resident(pager, layer, resident);
    PyObject *result = error == 0
        ? PyBytes_FromStringAndSize((const char *) resident, self->n_experts[layer]) : gp_error_raise(error);
    free(resident);
    return result;
}

PyObject *gp_pager_object_chosen(PyObject *object, PyObject *args) {
    PagerObject *self = (PagerObject *) object;
    unsigned int layer;
    gp_pager *pager = opened_for_layer(self, args, &layer);
    if (!pager) {
        return NULL;
    }
    const uint32_t n_experts = self->n_experts[layer];
    uint64_t *chosen = malloc(n_experts * sizeof *chosen);
    if (!chosen) {
        return PyErr_NoMemory();
    }
    const int error = gp_pager_chosen(pager, layer, chosen);
    PyObject *list = error == 0 ? PyList_New(n_experts) : gp_error_raise(error);
    for (uint32_t e = 0; list && e < n_experts; e++) {
        PyObject *number = PyLong_FromUnsignedLongLong(chosen[e]);
        if (!number || PyList_SetItem(list, e, number) != 0) {  /* which takes the number, also when it fails */
            Py_DECREF(list);
            list = NULL;
        }
    }
    free(chosen);
    return list;
}

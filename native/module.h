/* What the files of gguf_pager._native share. First of all includes, as Python.h has to be. */
#ifndef GGUF_PAGER_MODULE_H
#define GGUF_PAGER_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

#include "gguf_pager.h"

typedef struct {
    PyObject *pager_type;
    PyObject *open_error;
} module_state;

typedef struct {
    PyObject_HEAD
    gp_pager *pager;
    uint32_t  n_layers;
    uint32_t *n_experts;    /* per layer */
    uint32_t  n_copies, n_files;    /* files of all copies */
    uint32_t  n_users;      /* taps, and calls that run without the GIL */
    PyObject *compare;      /* gp_compare's answer: 0 for GP_SAME, or an errno */
    PyObject *caught;       /* what it has raised and nobody has taken yet, by thread */
} PagerObject;

extern PyType_Spec gp_pager_spec, gp_tap_spec, gp_mutex_spec;

/* The pager of a PagerObject; NULL, and ValueError raised: it is closed. */
gp_pager *gp_pager_object_opened(PagerObject *self);
/* What a comparison has raised in this thread since it was asked last; NULL if nothing. */
PyObject *gp_pager_object_take_caught(PagerObject *self);

/* Methods of Pager (module_counts.c). */
PyObject *gp_pager_object_counters(PyObject *object, PyObject *unused);
PyObject *gp_pager_object_copies(PyObject *object, PyObject *unused);
PyObject *gp_pager_object_rows(PyObject *object, PyObject *unused);
PyObject *gp_pager_object_resident(PyObject *object, PyObject *args);
PyObject *gp_pager_object_chosen(PyObject *object, PyObject *args);

typedef struct {
    PyObject   **objects;
    const char **paths;
    Py_ssize_t   n;
} gp_path_list;

/* Owned copies of a config's arrays while it is handed over. */
typedef struct {
    gp_path_list   files, mirror_files[GP_MAX_COPIES];
    gp_mirror_spec mirrors[GP_MAX_COPIES];
    gp_layer_spec *layers;
    gp_class_spec *classes;
    gp_table_spec *tables;
    Py_ssize_t     n_mirrors, n_layers, n_classes, n_tables;
} gp_config_arrays;

/* False: an exception is raised. Zeroed before, and to be freed in either case. */
bool gp_config_parse(gp_config_arrays *arrays, PyObject *paths, PyObject *mirrors, PyObject *layers, PyObject *classes,
                     PyObject *tables);
void gp_config_free(gp_config_arrays *arrays);

/* Raises OSError for -errno; returns NULL. */
PyObject *gp_error_raise(int error);
/* Raises OpenError; `type` is Pager. */
void      gp_error_raise_open(PyTypeObject *type, int error, const gp_open_failure *failure);
/* What was raised just now, which is not raised any more. */
PyObject *gp_error_take(void);
PyObject *gp_error_tuple(const gp_failure *failure);

#endif

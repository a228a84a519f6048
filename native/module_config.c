/* The description of a model, as Python gives it to Pager: sequences of tuples become a gp_config's arrays. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

static bool parse_slice(PyObject *item, gp_slice_spec *slice) {
    const char *name;
    int type;
    long long ne[3];
    unsigned int file;
    unsigned long long offset, bytes, data_at, region_at, region_bytes;
    if (!PyArg_ParseTuple(item, "si(LLL)IKKKKK", &name, &type, &ne[0], &ne[1], &ne[2], &file, &offset, &bytes,
                          &data_at, &region_at, &region_bytes)) {
        return false;
    }
    if (strlen(name) >= GP_MAX_NAME) {
        PyErr_Format(PyExc_ValueError, "tensor name too long: %s", name);
        return false;
    }
    *slice = (gp_slice_spec) {
        .type = type, .ne = { ne[0], ne[1], ne[2] }, .file = file, .offset_bytes = offset, .slice_bytes = bytes,
        .data_at = data_at, .region_at = region_at, .region_bytes = region_bytes,
    };
    strcpy(slice->name, name);
    return true;
}

static bool parse_layer(PyObject *item, gp_layer_spec *layer) {
    PyObject *slices;
    *layer = (gp_layer_spec) { 0 };
    if (!PyArg_ParseTuple(item, "IIIO", &layer->n_experts, &layer->n_used, &layer->shape_class, &slices)) {
        return false;
    }
    const Py_ssize_t n = PySequence_Size(slices);
    if (n < 0) {
        return false;
    }
    if (n > GP_MAX_SLICES) {
        PyErr_SetString(PyExc_ValueError, "too many slices in a layer");
        return false;
    }
    layer->n_slices = (uint32_t) n;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *slice = PySequence_GetItem(slices, i);
        const bool is_parsed = slice && parse_slice(slice, &layer->slices[i]);
        Py_XDECREF(slice);
        if (!is_parsed) {
            return false;
        }
    }
    return true;
}

static bool parse_table(PyObject *item, gp_table_spec *table) {
    const char *name;
    int type;
    long long ne[2];
    unsigned int file;
    unsigned long long offset, bytes;
    if (!PyArg_ParseTuple(item, "si(LL)IKK", &name, &type, &ne[0], &ne[1], &file, &offset, &bytes)) {
        return false;
    }
    if (strlen(name) >= GP_MAX_NAME) {
        PyErr_Format(PyExc_ValueError, "tensor name too long: %s", name);
        return false;
    }
    *table = (gp_table_spec) { .type = type, .ne = { ne[0], ne[1] }, .file = file, .offset_bytes = offset, .row_bytes = bytes };
    strcpy(table->name, name);
    return true;
}

static bool parse_class(PyObject *item, gp_class_spec *class) {
    unsigned long long stride_bytes;
    if (!PyArg_ParseTuple(item, "KI", &stride_bytes, &class->n_slots)) {
        return false;
    }
    class->stride_bytes = stride_bytes;
    return true;
}

static void free_paths(gp_path_list *list) {
    for (Py_ssize_t i = 0; list->objects && i < list->n; i++) {
        Py_XDECREF(list->objects[i]);
    }
    free(list->objects);
    free(list->paths);
}

static bool parse_paths(gp_path_list *list, PyObject *sequence) {
    list->n = PySequence_Size(sequence);
    if (list->n < 0) {
        return false;
    }
    list->objects = calloc((size_t) list->n + 1, sizeof *list->objects);
    list->paths = calloc((size_t) list->n + 1, sizeof *list->paths);
    if (!list->objects || !list->paths) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < list->n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        const int converted = item ? PyUnicode_FSConverter(item, &list->objects[i]) : 0;
        Py_XDECREF(item);
        if (!converted) {
            return false;
        }
        list->paths[i] = PyBytes_AsString(list->objects[i]);
    }
    return true;
}

void gp_config_free(gp_config_arrays *arrays) {
    free_paths(&arrays->files);
    for (Py_ssize_t i = 0; i < GP_MAX_COPIES; i++) {
        free_paths(&arrays->mirror_files[i]);
    }
    free(arrays->layers);
    free(arrays->classes);
    free(arrays->tables);
}

static bool parse_mirrors(gp_config_arrays *arrays, PyObject *sequence) {
    arrays->n_mirrors = PySequence_Size(sequence);
    if (arrays->n_mirrors >= GP_MAX_COPIES) {
        PyErr_SetString(PyExc_ValueError, "too many mirrors");
        return false;
    }
    for (Py_ssize_t i = 0; i < arrays->n_mirrors; i++) {
        PyObject *item = PySequence_GetItem(sequence, i), *paths = NULL;
        int direct = 0;
        const bool is_parsed = item && PyArg_ParseTuple(item, "Op", &paths, &direct)
            && parse_paths(&arrays->mirror_files[i], paths);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
        if (arrays->mirror_files[i].n != arrays->files.n) {
            PyErr_SetString(PyExc_ValueError, "a mirror has as many files as the model");
            return false;
        }
        arrays->mirrors[i] = (gp_mirror_spec) { arrays->mirror_files[i].paths, direct };
    }
    return arrays->n_mirrors >= 0;
}

bool gp_config_parse(gp_config_arrays *arrays, PyObject *paths, PyObject *mirrors, PyObject *layers, PyObject *classes,
                     PyObject *tables) {
    if (!parse_paths(&arrays->files, paths) || !parse_mirrors(arrays, mirrors)) {
        return false;
    }
    arrays->n_layers = PySequence_Size(layers);
    arrays->n_classes = PySequence_Size(classes);
    arrays->n_tables = PySequence_Size(tables);
    if (arrays->n_layers < 0 || arrays->n_classes < 0 || arrays->n_tables < 0) {
        return false;
    }
    arrays->layers = calloc((size_t) arrays->n_layers + 1, sizeof *arrays->layers);
    arrays->classes = calloc((size_t) arrays->n_classes + 1, sizeof *arrays->classes);
    arrays->tables = calloc((size_t) arrays->n_tables + 1, sizeof *arrays->tables);
    if (!arrays->layers || !arrays->classes || !arrays->tables) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < arrays->n_layers; i++) {
        PyObject *item = PySequence_GetItem(layers, i);
        const bool is_parsed = item && parse_layer(item, &arrays->layers[i]);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
    }
    for (Py_ssize_t i = 0; i < arrays->n_classes; i++) {
        PyObject *item = PySequence_GetItem(classes, i);
        const bool is_parsed = item && parse_class(item, &arrays->classes[i]);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
    }
    for (Py_ssize_t i = 0; i < arrays->n_tables; i++) {
        PyObject *item = PySequence_GetItem(tables, i);
        const bool is_parsed = item && parse_table(item, &arrays->tables[i]);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
    }
    return true;
}

/* gguf_pager._native: its functions, and its types, which have a file each. The files called module are the only ones that
 * include Python.h. They convert arguments and errors, nothing else. What they offer is described in gguf_pager/_native.pyi. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

#include "compute/ggml_tensor.h"

static PyObject *file_alignment(PyObject *module, PyObject *args) {
    (void) module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    uint32_t offset_align = 0, memory_align = 0;
    const int error = gp_os_system.file_alignment(PyBytes_AsString(path), &offset_align, &memory_align);
    Py_DECREF(path);
    return error == 0 ? Py_BuildValue("(II)", offset_align, memory_align) : gp_error_raise(error);
}

static PyObject *memory_lock(PyObject *module, PyObject *args) {
    (void) module;
    unsigned long long address, bytes;
    if (!PyArg_ParseTuple(args, "KK", &address, &bytes)) {
        return NULL;
    }
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = gp_os_memory_lock_coming((void *) (uintptr_t) address, bytes);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        return gp_error_raise(error);
    }
    Py_RETURN_NONE;
}

static PyObject *lazy_load_begin(PyObject *module, PyObject *args) {
    (void) module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    const int error = gp_os_lazy_load_begin(PyBytes_AsString(path));
    Py_DECREF(path);
    if (error != 0) {
        return gp_error_raise(error);
    }
    Py_RETURN_NONE;
}

static PyObject *lazy_load_end(PyObject *module, PyObject *unused) {
    (void) module;
    (void) unused;
    const uint32_t n = gp_os_take_mappings(NULL, 0);
    gp_mapping *mappings = calloc((size_t) n + 1, sizeof *mappings);
    const uint32_t n_taken = mappings ? gp_os_take_mappings(mappings, n) : 0;   /* by this thread: there are no more now */
    gp_os_lazy_load_end();
    if (!mappings) {
        return PyErr_NoMemory();
    }
    PyObject *list = PyList_New((Py_ssize_t) n_taken);
    for (uint32_t i = 0; list && i < n_taken; i++) {
        PyObject *item = Py_BuildValue("(KKKKK)", (unsigned long long) (uintptr_t) mappings[i].address,
                                       (unsigned long long) mappings[i].bytes,
                                       (unsigned long long) mappings[i].device, (unsigned long long) mappings[i].inode,
                                       (unsigned long long) mappings[i].offset_bytes);
        if (!item || PyList_SetItem(list, (Py_ssize_t) i, item) != 0) {     /* which takes the item, also when it fails */
            Py_CLEAR(list);
        }
    }
    free(mappings);
    return list;
}

static PyObject *policy_exists(PyObject *module, PyObject *args) {
    (void) module;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) {
        return NULL;
    }
    return PyBool_FromLong(gp_policy_exists(name));
}

/* A tensor of ggml's as this side's declaration sees it, for comparison with what ggml says. */
static PyObject *read_tensor(PyObject *module, PyObject *args) {
    (void) module;
    unsigned long long address;
    if (!PyArg_ParseTuple(args, "K", &address)) {
        return NULL;
    }
    const ggml_tensor *t = (const ggml_tensor *) (uintptr_t) address;
    char name[GGML_NAME_BYTES + 1] = { 0 };
    memcpy(name, t->name, GGML_NAME_BYTES);
    gp_custom custom;
    memcpy(&custom, t->op_params, sizeof custom);
    return Py_BuildValue(
        "{s:n,s:i,s:K,s:(LLLL),s:(KKKK),s:i,s:i,s:(KiK),s:(KKK),s:K,s:K,s:K,s:s}", "struct_bytes", (Py_ssize_t) sizeof *t,
        "type", t->type, "buffer", (unsigned long long) (uintptr_t) t->buffer,
        "ne", t->ne[0], t->ne[1], t->ne[2], t->ne[3],
        "nb", (unsigned long long) t->nb[0], (unsigned long long) t->nb[1], (unsigned long long) t->nb[2],
        (unsigned long long) t->nb[3], "op", t->op, "flags", t->flags,
        "custom", (unsigned long long) (uintptr_t) custom.compute, custom.n_tasks,
        (unsigned long long) (uintptr_t) custom.data,
        "src", (unsigned long long) (uintptr_t) t->src[0], (unsigned long long) (uintptr_t) t->src[1],
        (unsigned long long) (uintptr_t) t->src[2],
        "view_src", (unsigned long long) (uintptr_t) t->view_src, "view_offs", (unsigned long long) t->view_offs,
        "data", (unsigned long long) (uintptr_t) t->data, "name", name);
}

static PyMethodDef functions[] = {
    { "file_alignment", file_alignment, METH_VARARGS, NULL },
    { "memory_lock", memory_lock, METH_VARARGS, NULL },
    { "lazy_load_begin", lazy_load_begin, METH_VARARGS, NULL },
    { "lazy_load_end", lazy_load_end, METH_NOARGS, NULL },
    { "policy_exists", policy_exists, METH_VARARGS, NULL },
    { "read_tensor", read_tensor, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static int fill_module(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    state->pager_type = PyType_FromModuleAndSpec(module, &gp_pager_spec, NULL);
    if (!state->pager_type || PyModule_AddObjectRef(module, "Pager", state->pager_type) != 0) {
        return -1;
    }
    state->open_error = PyErr_NewException("gguf_pager._native.OpenError", PyExc_OSError, NULL);
    if (!state->open_error || PyModule_AddObjectRef(module, "OpenError", state->open_error) != 0) {
        return -1;
    }
    PyObject *tap_type = PyType_FromModuleAndSpec(module, &gp_tap_spec, NULL);
    int error = tap_type ? PyModule_AddObjectRef(module, "Tap", tap_type) : -1;
    Py_XDECREF(tap_type);
    PyObject *mutex_type = error == 0 ? PyType_FromModuleAndSpec(module, &gp_mutex_spec, NULL) : NULL;
    error = mutex_type ? PyModule_AddObjectRef(module, "Mutex", mutex_type) : -1;
    Py_XDECREF(mutex_type);
    return error;
}

static void free_module(void *module) {
    module_state *state = PyModule_GetState((PyObject *) module);
    if (state) {
        Py_CLEAR(state->pager_type);
        Py_CLEAR(state->open_error);
    }
}

static PyModuleDef_Slot module_slots[] = {
    { Py_mod_exec, (void *) (uintptr_t) fill_module },
    { 0, NULL },
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "The C core of gguf_pager; private.",
    .m_size = sizeof(module_state),
    .m_methods = functions,
    .m_slots = module_slots,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}

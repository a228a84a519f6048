/* The types of gguf_pager._native that have a file of their own. Python.h first, with PY_SSIZE_T_CLEAN. */
#ifndef GGUF_PAGER_MODULE_H
#define GGUF_PAGER_MODULE_H

extern PyType_Spec gp_mutex_spec;

#endif

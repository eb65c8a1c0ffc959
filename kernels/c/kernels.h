/* What the generated sources and fusedkd.c share: kernels/aot/embed.py writes the tables, fusedkd.c reads them. */
#ifndef FUSEDKD_KERNELS_H
#define FUSEDKD_KERNELS_H

#include <math.h>

#include "fusedkd.h"

/* Everything that a kernel may take; each takes the addresses of some, in its own order. */
struct values {
    uint64_t student, teacher, labels, loss, stats, weights, grad; /* device addresses */
    int64_t student_row, student_column, teacher_row, teacher_column, grad_row, grad_column, zero_stride;
    int32_t zero, rows, vocab_size, width;
    float inv_temperature, factor, theta[4], target, nontarget, mix;
};

/* The place of a field, if it has the size that the compiled kernel expects: else the array size is negative. */
#define AT(field, size) \
    (unsigned short)(offsetof(struct values, field) + \
                     0 * sizeof(char[sizeof(((struct values *)0)->field) == (size) ? 1 : -1]))

struct fusedkd_kernel {
    const char *divergence, *entry; /* as in the manifest */
    const unsigned char *cubin;
    unsigned char dtype;
    unsigned char arch;     /* 80, 90 ... */
    unsigned char exact;    /* runs on this compute capability alone, not on later ones of its generation */
    unsigned char gradient; /* value and gradient, or the value alone */
    unsigned char aligned;
    unsigned short threads, shared;
    unsigned char count, scratch; /* arguments, and null pointers behind them */
    unsigned short arguments[32];
};

struct fusedkd_part { /* the kernels of one architecture and dtype */
    const struct fusedkd_kernel *kernels;
    const int *count;
};

struct fusedkd_parameter {
    const char *name;
    double value, low, high; /* default, and the domain with its ends */
    int flag;                /* 0 or 1, nothing between */
};

struct fusedkd_affine { /* offset + sum of slope[i] parameter[i] */
    double offset, slope[FUSEDKD_PARAMETERS];
};

struct fusedkd_divergence_spec {
    const char *name, *kernel;
    unsigned char decoupled; /* always, with weights that are parameters */
    unsigned char separable; /* has a joint and a decoupled form */
    unsigned char weighted;  /* takes target and nontarget */
    unsigned char parameter_count, theta_count, choices;
    struct fusedkd_parameter parameters[FUSEDKD_PARAMETERS];
    struct fusedkd_affine theta[4], target, nontarget, mix;
    struct {
        double low, high;
    } one_sweep[4]; /* where all theta lie in these, the kernel of one sweep is exact; else "_two" */
};

extern const struct fusedkd_part fusedkd_parts[];
extern const int fusedkd_part_count;
extern const struct fusedkd_divergence_spec fusedkd_specs[];
extern const int fusedkd_spec_count;

#endif

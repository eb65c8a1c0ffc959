/*
 * fusedkd: knowledge-distillation divergences over rows of logits, value and gradient, on NVIDIA GPUs.
 *
 * One call takes the logits of student and teacher, [rows, vocabulary] in device memory, and writes each row's divergence
 * D(p, q) in nats (p = softmax of the teacher, q = softmax of the student, both over temperature) and, if asked, its
 * gradient with respect to the student's logits. The kernels were compiled ahead of time: at run time this library needs
 * libcuda and nothing else. It prints nothing, allocates no device memory, and never ends the process.
 *
 *     fusedkd_rows_args args;
 *     fusedkd_rows_defaults(&args, FUSEDKD_DIVERGENCE_DRKL);
 *     args.rows = N; args.vocab_size = V; args.dtype = FUSEDKD_BFLOAT16;
 *     args.student = s; args.teacher = t; args.labels = y; args.loss = loss; args.grad = g;
 *     fusedkd_status status = fusedkd_rows(&args, stream);
 *
 * C99 and C++17. Any thread may call, at any time; a call is asynchronous on its stream and runs on the device of the
 * thread's current CUDA context. The first call of a kernel in a context loads it, which must not happen while a stream
 * is captured: make one call before capturing.
 */
#ifndef FUSEDKD_H
#define FUSEDKD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FUSEDKD_API __attribute__((visibility("default")))
#define FUSEDKD_PARAMETERS 4 /* room for those of any divergence */
#define FUSEDKD_STATS 11     /* per-token statistics */

typedef enum fusedkd_status {
    FUSEDKD_OK = 0,
    FUSEDKD_BAD_ARGS = 1,        /* args is null, or was not made by fusedkd_rows_defaults of this version */
    FUSEDKD_BAD_DIVERGENCE = 2,  /* no such number */
    FUSEDKD_BAD_PARAMETER = 3,   /* a parameter outside the divergence's domain, or not finite */
    FUSEDKD_BAD_WEIGHT = 4,      /* target or nontarget negative, or given where the divergence has its own */
    FUSEDKD_BAD_STRUCTURE = 5,   /* decoupled with a divergence that has no decoupled form */
    FUSEDKD_BAD_SHAPE = 6,       /* rows, vocab_size or width outside its range */
    FUSEDKD_BAD_STRIDE = 7,      /* grad_column_stride is 0: its columns would overlap */
    FUSEDKD_BAD_DTYPE = 8,       /* no such number */
    FUSEDKD_BAD_POINTER = 9,     /* student, teacher or loss is null, or an address is no multiple of its element */
    FUSEDKD_BAD_TEMPERATURE = 10, /* not finite, or not above 0 */
    FUSEDKD_NEEDS_LABELS = 11,   /* decoupled, or weights other than 1, and labels is null */
    FUSEDKD_BAD_WORKSPACE = 12,  /* smaller than fusedkd_rows_workspace says, null, or not 8-byte aligned */
    FUSEDKD_NO_DRIVER = 13,      /* libcuda.so.1 cannot be loaded: no NVIDIA driver on this machine */
    FUSEDKD_NO_CONTEXT = 14,     /* the thread has no current CUDA context */
    FUSEDKD_NO_KERNEL = 15,      /* not built for this device, dtype or divergence */
    FUSEDKD_DRIVER_ERROR = 16    /* the driver refused a call: fusedkd_driver_error() is its number */
} fusedkd_status;

typedef enum fusedkd_dtype { FUSEDKD_FLOAT32 = 0, FUSEDKD_BFLOAT16 = 1, FUSEDKD_FLOAT16 = 2 } fusedkd_dtype;

/*
 * The divergences. Parameters, in the order of args.parameters, with their defaults:
 *     FKL KL(p|q), RKL KL(q|p), TVD, HELLINGER     none
 *     DRKL gamma=0.5    DKD alpha=1, beta=8    ALPHA alpha=0.5    AB alpha=0.2, beta=0.7    FRKL w=0.5    JSD beta=0.5
 *     SKL lam=0.1       SRKL lam=0.1, detach_mixture=0    AKL mu=0.5
 *     TAID t=0.4 (base FKL)    AMID alpha=0.5, lam=0.5 (base FKL, order "pr")
 * Any decoupled divergence other than DRKL and DKD: args.decoupled with its base. Numbers are never given anew.
 */
typedef enum fusedkd_divergence {
    FUSEDKD_DIVERGENCE_FKL = 0,
    FUSEDKD_DIVERGENCE_RKL = 1,
    FUSEDKD_DIVERGENCE_DRKL = 2,
    FUSEDKD_DIVERGENCE_AB = 3,
    FUSEDKD_DIVERGENCE_ALPHA = 4,
    FUSEDKD_DIVERGENCE_FRKL = 5,
    FUSEDKD_DIVERGENCE_JSD = 6,
    FUSEDKD_DIVERGENCE_SKL = 7,
    FUSEDKD_DIVERGENCE_SRKL = 8,
    FUSEDKD_DIVERGENCE_TVD = 9,
    FUSEDKD_DIVERGENCE_HELLINGER = 10,
    FUSEDKD_DIVERGENCE_DKD = 11,
    FUSEDKD_DIVERGENCE_TAID = 12,
    FUSEDKD_DIVERGENCE_AMID = 13,
    FUSEDKD_DIVERGENCE_AKL = 14
} fusedkd_divergence;

/*
 * One call. N = rows, V = vocab_size. Pointers are device addresses. Strides count elements and may be negative; a row
 * stride of 0 stands for V (in grad for width). A teacher logit of -inf removes its column from both sides.
 *
 * Rows that are contiguous (column stride 1), 16-byte aligned, with V, width and row strides multiples of 16, and no
 * stats, take the fast kernels; any other layout the generic ones.
 */
typedef struct fusedkd_rows_args {
    size_t size; /* sizeof(fusedkd_rows_args) of the caller: set by fusedkd_rows_defaults */
    fusedkd_divergence divergence;
    fusedkd_dtype dtype; /* of student, teacher and grad */
    double parameters[FUSEDKD_PARAMETERS];
    double target, nontarget; /* weights of the two terms of L = target L_T + nontarget L_N; 1, 1 */
    int decoupled;            /* 1: binary divergence of (label, rest) plus the divergence of the renormalised rest */
    int temperature_squared;  /* 1: loss and gradient times temperature^2 */
    double temperature;       /* divides both logits; 1 */
    int64_t rows;             /* N, 0 to 2^31 - 1 */
    int64_t vocab_size;       /* V, 1 to 2^31 - 1: the columns that are compared */
    int64_t width;            /* columns of grad that are written, those from V on with 0; 0 stands for V */
    const void *student;      /* [N, V] logits */
    const void *teacher;      /* [N, V] logits */
    int64_t student_row_stride, student_column_stride; /* 0, 1 */
    int64_t teacher_row_stride, teacher_column_stride;
    const int64_t *labels; /* [N] the target of each row; null: none. A row with a negative label is ignored: nothing of it
                              is read, zeros are written. A label of V or more targets nothing. */
    const float *weights;  /* [N] each row's gradient is multiplied by its weight, its loss is not; null: 1 */
    float *loss;           /* [N] nats */
    void *grad;            /* [N, width] weight_n dloss_n/dstudent; null: the value alone. May be student itself,
                     with its strides */
    int64_t grad_row_stride, grad_column_stride;
    float *stats; /* [N, 11] or null: loss, target_loss, nontarget_loss, d target_loss/dz_y, d nontarget_loss/dz_y (z the
                     student's logits over temperature; all before weights and temperature^2), entropies of student and
                     teacher, log-probabilities of the label, log-sum-exps. Without labels those of a label that is not in
                     the vocabulary: terms 0 and loss, log-probabilities -inf. */
    void *workspace; /* 8-byte aligned, of fusedkd_rows_workspace bytes; may be null where that is 0 */
    size_t workspace_bytes;
} fusedkd_rows_args;

/* Fills args: the divergence with its default parameters, weights 1, temperature 1, column strides 1, float32, all else 0.
   Errors: BAD_ARGS, BAD_DIVERGENCE. */
FUSEDKD_API fusedkd_status fusedkd_rows_defaults(fusedkd_rows_args *args, fusedkd_divergence divergence);

/* Bytes of workspace that a call needs (at most 56 N): pointers are looked at only for their alignment and null.
   Asks no driver. Errors: those of the arguments but BAD_WORKSPACE. */
FUSEDKD_API fusedkd_status fusedkd_rows_workspace(const fusedkd_rows_args *args, size_t *bytes);

/* Starts the work on a CUstream or cudaStream_t (null: the default stream). Arguments are checked before anything starts.
   Bits do not differ from call to call. */
FUSEDKD_API fusedkd_status fusedkd_rows(const fusedkd_rows_args *args, void *stream);

/* What a status means and what would work: static, English, never null. */
FUSEDKD_API const char *fusedkd_status_string(fusedkd_status status);

/* The CUresult of this thread's last DRIVER_ERROR. */
FUSEDKD_API int fusedkd_driver_error(void);

/* A divergence's name in Python, its number of parameters and their names; null or -1 for no such number or index. */
FUSEDKD_API const char *fusedkd_divergence_name(fusedkd_divergence divergence);
FUSEDKD_API int fusedkd_parameter_count(fusedkd_divergence divergence);
FUSEDKD_API const char *fusedkd_parameter_name(fusedkd_divergence divergence, int index);

#ifdef __cplusplus
}
#endif
#endif

/* The C interface over the embedded kernels: checks, choice of a kernel, loading, launch. */
#include "fusedkd.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

/* The driver, found at run time. FUSEDKD_LIBCUDA names another file than libcuda.so.1. */

static struct {
    int (*context)(void **);                       /* cuCtxGetCurrent */
    int (*context_id)(void *, unsigned long long *); /* cuCtxGetId, from CUDA 12.0 on; null before */
    int (*device)(int *);                          /* cuCtxGetDevice */
    int (*attribute)(int *, int, int);             /* cuDeviceGetAttribute */
    int (*load)(void **, const void *);            /* cuModuleLoadData */
    int (*function)(void **, void *, const char *); /* cuModuleGetFunction */
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    int (*fill)(uint64_t, unsigned, size_t, void *); /* cuMemsetD32Async */
    int ready;
} driver;

enum { MAJOR = 75, MINOR = 76 }; /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR */

static pthread_once_t driver_once = PTHREAD_ONCE_INIT;
static __thread int driver_error;

static void find(void *library, const char *name, void *into) {
    void *found = dlsym(library, name);
    memcpy(into, &found, sizeof found); /* ISO C has no cast from an object's to a function's pointer */
}

static void find_driver(void) {
    const char *given = getenv("FUSEDKD_LIBCUDA");
    void *library = dlopen(given ? given : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    int (*init)(unsigned) = NULL;
    if (!library) return;
    find(library, "cuInit", &init);
    find(library, "cuCtxGetCurrent", &driver.context);
    find(library, "cuCtxGetId", &driver.context_id);
    find(library, "cuCtxGetDevice", &driver.device);
    find(library, "cuDeviceGetAttribute", &driver.attribute);
    find(library, "cuModuleLoadData", &driver.load);
    find(library, "cuModuleGetFunction", &driver.function);
    find(library, "cuLaunchKernel", &driver.launch);
    find(library, "cuMemsetD32Async", &driver.fill);
    driver.ready = init && driver.context && driver.device && driver.attribute && driver.load && driver.function &&
                   driver.launch && driver.fill && init(0) == 0;
}

static fusedkd_status driver_says(int result) {
    if (result == 0) return FUSEDKD_OK;
    driver_error = result;
    return FUSEDKD_DRIVER_ERROR;
}

/* Loaded kernels: a list per process, of one entry per kernel and context. A context's modules go with it; its id, which
   is never used again, keeps a new context at the same address from finding them. */

struct loaded {
    const struct fusedkd_kernel *kernel;
    void *context, *function;
    unsigned long long id;
    struct loaded *next;
};

static pthread_mutex_t loaded_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct loaded *loaded_list;

static fusedkd_status load(const struct fusedkd_kernel *kernel, void *context, void **function) {
    unsigned long long id = 0;
    fusedkd_status status = FUSEDKD_OK;
    if (driver.context_id && (status = driver_says(driver.context_id(context, &id)))) return status;
    pthread_mutex_lock(&loaded_mutex);
    struct loaded *found = loaded_list;
    while (found && !(found->kernel == kernel && found->context == context && found->id == id)) found = found->next;
    if (!found) {
        void *module = NULL;
        struct loaded *made = malloc(sizeof *made);
        if (!made) status = driver_says(2); /* CUDA_ERROR_OUT_OF_MEMORY */
        if (!status) status = driver_says(driver.load(&module, kernel->cubin));
        if (!status) status = driver_says(driver.function(&made->function, module, kernel->entry));
        if (!status) {
            made->kernel = kernel;
            made->context = context;
            made->id = id;
            made->next = loaded_list;
            found = loaded_list = made;
        } else {
            free(made);
        }
    }
    if (found) *function = found->function;
    pthread_mutex_unlock(&loaded_mutex);
    return status;
}

/* What a call asks for. */

struct call {
    const struct fusedkd_divergence_spec *spec;
    struct values values;
    char divergence[64]; /* the kernel's, as in the manifest */
    int aligned;
    size_t workspace, made_labels, made_weights, made_stats; /* bytes in all, and where each begins */
};

static const size_t NOTHING = (size_t)-1;

static const size_t element_size[] = {4, 2, 2};

static int finite_weight(double x) { return isfinite(x) && x >= 0; }

static double at(const struct fusedkd_affine *map, const double *parameters) {
    double sum = map->offset;
    for (int i = 0; i < FUSEDKD_PARAMETERS; i++) sum += map->slope[i] * parameters[i];
    return sum;
}

static fusedkd_status choose(const fusedkd_rows_args *args, struct call *call) {
    if ((int)args->divergence < 0 || (int)args->divergence >= fusedkd_spec_count) return FUSEDKD_BAD_DIVERGENCE;
    const struct fusedkd_divergence_spec *spec = call->spec = &fusedkd_specs[args->divergence];
    struct values *values = &call->values;
    double known[FUSEDKD_PARAMETERS] = {0};
    for (int i = 0; i < spec->parameter_count; i++) {
        const struct fusedkd_parameter *parameter = &spec->parameters[i];
        double x = known[i] = args->parameters[i];
        if (!isfinite(x) || x < parameter->low || x > parameter->high) return FUSEDKD_BAD_PARAMETER;
        if (parameter->flag && x != 0 && x != 1) return FUSEDKD_BAD_PARAMETER;
    }
    if (!finite_weight(args->target) || !finite_weight(args->nontarget)) return FUSEDKD_BAD_WEIGHT;
    int weighted = args->target != 1 || args->nontarget != 1;
    if (weighted && !spec->weighted) return FUSEDKD_BAD_WEIGHT;
    if (args->decoupled && !spec->separable) return FUSEDKD_BAD_STRUCTURE;
    if ((spec->decoupled || args->decoupled || weighted) && !args->labels) return FUSEDKD_NEEDS_LABELS;
    int one_sweep = 1;
    for (int i = 0; i < spec->theta_count; i++) {
        double x = at(&spec->theta[i], known);
        values->theta[i] = (float)x;
        if (i < spec->choices && !(spec->one_sweep[i].low <= x && x <= spec->one_sweep[i].high)) one_sweep = 0;
    }
    values->target = (float)(spec->weighted ? args->target : at(&spec->target, known));
    values->nontarget = (float)(spec->weighted ? args->nontarget : at(&spec->nontarget, known));
    values->mix = (float)at(&spec->mix, known);
    strcpy(call->divergence, spec->decoupled || args->decoupled ? "decoupled_" : "");
    strcat(call->divergence, spec->kernel);
    strcat(call->divergence, one_sweep ? "" : "_two");
    return FUSEDKD_OK;
}

static int misaligned(const void *pointer, size_t bytes) { return (uintptr_t)pointer % bytes != 0; }

static int by_sixteen(const void *pointer, int64_t row_stride, int64_t column_stride) {
    return !misaligned(pointer, 16) && row_stride % 16 == 0 && column_stride == 1;
}

static fusedkd_status prepare(const fusedkd_rows_args *args, struct call *call) {
    if (!args || args->size != sizeof *args) return FUSEDKD_BAD_ARGS;
    memset(call, 0, sizeof *call);
    struct values *values = &call->values;
    fusedkd_status status = choose(args, call);
    if (status) return status;
    if (args->rows < 0 || args->rows > INT32_MAX || args->vocab_size < 1 || args->vocab_size > INT32_MAX)
        return FUSEDKD_BAD_SHAPE;
    int64_t width = args->width ? args->width : args->vocab_size;
    if (width < args->vocab_size || width > INT32_MAX) return FUSEDKD_BAD_SHAPE;
    if ((int)args->dtype < 0 || (int)args->dtype > FUSEDKD_FLOAT16) return FUSEDKD_BAD_DTYPE;
    if (args->grad && args->grad_column_stride == 0) return FUSEDKD_BAD_STRIDE;
    if (!isfinite(args->temperature) || !(args->temperature > 0)) return FUSEDKD_BAD_TEMPERATURE;
    size_t element = element_size[args->dtype];
    if (args->rows && (!args->student || !args->teacher || !args->loss)) return FUSEDKD_BAD_POINTER;
    if (misaligned(args->student, element) || misaligned(args->teacher, element) || misaligned(args->grad, element) ||
        misaligned(args->labels, 8) || misaligned(args->weights, 4) || misaligned(args->loss, 4) ||
        misaligned(args->stats, 4))
        return FUSEDKD_BAD_POINTER;

    values->student = (uintptr_t)args->student;
    values->teacher = (uintptr_t)args->teacher;
    values->labels = (uintptr_t)args->labels;
    values->loss = (uintptr_t)args->loss;
    values->stats = (uintptr_t)args->stats;
    values->weights = (uintptr_t)args->weights;
    values->grad = (uintptr_t)args->grad;
    values->student_row = args->student_row_stride ? args->student_row_stride : args->vocab_size;
    values->teacher_row = args->teacher_row_stride ? args->teacher_row_stride : args->vocab_size;
    values->grad_row = args->grad_row_stride ? args->grad_row_stride : width;
    values->student_column = args->student_column_stride;
    values->teacher_column = args->teacher_column_stride;
    values->grad_column = args->grad_column_stride;
    values->rows = args->rows ? (int32_t)args->rows : 1;
    values->vocab_size = (int32_t)args->vocab_size;
    values->width = (int32_t)width;
    values->inv_temperature = (float)(1 / args->temperature);
    values->factor = (float)(args->temperature_squared ? args->temperature * args->temperature : 1);

    call->aligned = !args->stats && args->vocab_size % 16 == 0 &&
                    by_sixteen(args->student, values->student_row, values->student_column) &&
                    by_sixteen(args->teacher, values->teacher_row, values->teacher_column) &&
                    (!args->grad || (by_sixteen(args->grad, values->grad_row, values->grad_column) && width % 16 == 0));
    size_t rows = (size_t)args->rows;
    call->made_labels = call->made_weights = call->made_stats = NOTHING;
    if (!args->labels) {
        call->made_labels = call->workspace;
        call->workspace += 8 * rows;
    }
    if (args->grad && !args->weights) {
        call->made_weights = call->workspace;
        call->workspace += 4 * rows;
    }
    if (!call->aligned && !args->stats) {
        call->made_stats = call->workspace;
        call->workspace += 4 * FUSEDKD_STATS * rows;
    }
    return FUSEDKD_OK;
}

static const struct fusedkd_kernel *kernel_for(const fusedkd_rows_args *args, const struct call *call, int arch) {
    const struct fusedkd_kernel *best = NULL;
    for (int i = 0; i < fusedkd_part_count; i++) {
        const struct fusedkd_kernel *kernel = fusedkd_parts[i].kernels, *end = kernel + *fusedkd_parts[i].count;
        if (kernel == end || kernel->dtype != args->dtype) continue;
        if (kernel->exact ? kernel->arch != arch : kernel->arch > arch || kernel->arch / 10 != arch / 10) continue;
        for (; kernel < end; kernel++) {
            if (kernel->gradient == (args->grad != NULL) && kernel->aligned == call->aligned &&
                !strcmp(kernel->divergence, call->divergence) && (!best || best->arch < kernel->arch))
                best = kernel;
        }
    }
    return best;
}

/* Public functions. */

fusedkd_status fusedkd_rows_defaults(fusedkd_rows_args *args, fusedkd_divergence divergence) {
    if (!args) return FUSEDKD_BAD_ARGS;
    if ((int)divergence < 0 || (int)divergence >= fusedkd_spec_count) return FUSEDKD_BAD_DIVERGENCE;
    memset(args, 0, sizeof *args);
    args->size = sizeof *args;
    args->divergence = divergence;
    for (int i = 0; i < fusedkd_specs[divergence].parameter_count; i++)
        args->parameters[i] = fusedkd_specs[divergence].parameters[i].value;
    args->target = args->nontarget = args->temperature = 1;
    args->student_column_stride = args->teacher_column_stride = args->grad_column_stride = 1;
    return FUSEDKD_OK;
}

fusedkd_status fusedkd_rows_workspace(const fusedkd_rows_args *args, size_t *bytes) {
    struct call call;
    fusedkd_status status = bytes ? prepare(args, &call) : FUSEDKD_BAD_ARGS;
    if (!status) *bytes = call.workspace;
    return status;
}

fusedkd_status fusedkd_rows(const fusedkd_rows_args *args, void *stream) {
    struct call call;
    struct values *values = &call.values;
    fusedkd_status status = prepare(args, &call);
    if (status) return status;
    if (call.workspace && (!args->workspace || args->workspace_bytes < call.workspace || misaligned(args->workspace, 8)))
        return FUSEDKD_BAD_WORKSPACE;
    pthread_once(&driver_once, find_driver);
    if (!driver.ready) return FUSEDKD_NO_DRIVER;
    void *context = NULL, *function = NULL;
    int device = 0, major = 0, minor = 0;
    if ((status = driver_says(driver.context(&context)))) return status;
    if (!context) return FUSEDKD_NO_CONTEXT;
    if ((status = driver_says(driver.device(&device)))) return status;
    if ((status = driver_says(driver.attribute(&major, MAJOR, device)))) return status;
    if ((status = driver_says(driver.attribute(&minor, MINOR, device)))) return status;
    const struct fusedkd_kernel *kernel = kernel_for(args, &call, 10 * major + minor);
    if (!kernel) return FUSEDKD_NO_KERNEL;
    if (!args->rows) return FUSEDKD_OK;
    if ((status = load(kernel, context, &function))) return status;

    uint64_t workspace = (uintptr_t)args->workspace;
    if (call.made_labels != NOTHING) {
        values->labels = workspace + call.made_labels; /* beyond any vocabulary, in either half: it targets nothing */
        if ((status = driver_says(driver.fill(values->labels, 0x7f7f7f7f, 2 * (size_t)args->rows, stream)))) return status;
    }
    if (call.made_weights != NOTHING) {
        values->weights = workspace + call.made_weights; /* 1.0f */
        if ((status = driver_says(driver.fill(values->weights, 0x3f800000, (size_t)args->rows, stream)))) return status;
    }
    if (call.made_stats != NOTHING) values->stats = workspace + call.made_stats;

    void *given[40];
    uint64_t scratch = 0;
    for (int i = 0; i < kernel->count; i++) given[i] = (char *)values + kernel->arguments[i];
    for (int i = 0; i < kernel->scratch; i++) given[kernel->count + i] = &scratch;
    return driver_says(driver.launch(function, (unsigned)args->rows, 1, 1, kernel->threads, 1, 1, kernel->shared, stream,
                                     given, NULL));
}

const char *fusedkd_status_string(fusedkd_status status) {
    switch (status) {
        case FUSEDKD_OK: return "success";
        case FUSEDKD_BAD_ARGS: return "args must be filled by fusedkd_rows_defaults of this version of the library";
        case FUSEDKD_BAD_DIVERGENCE: return "divergence must be one of the numbers of enum fusedkd_divergence";
        case FUSEDKD_BAD_PARAMETER: return "parameters must be finite and in the divergence's domain";
        case FUSEDKD_BAD_WEIGHT:
            return "target and nontarget must be finite and >= 0, and 1 for DRKL, DKD, TAID, AMID and AKL";
        case FUSEDKD_BAD_STRUCTURE: return "decoupled must be 0 for DRKL, DKD, TAID, AMID and AKL";
        case FUSEDKD_BAD_SHAPE: return "rows must lie in [0, 2^31), vocab_size in [1, 2^31), width in [vocab_size, 2^31)";
        case FUSEDKD_BAD_STRIDE: return "grad_column_stride must not be 0";
        case FUSEDKD_BAD_DTYPE: return "dtype must be one of the numbers of enum fusedkd_dtype";
        case FUSEDKD_BAD_POINTER: return "student, teacher and loss must be given; addresses, multiples of their element";
        case FUSEDKD_BAD_TEMPERATURE: return "temperature must be finite and above 0";
        case FUSEDKD_NEEDS_LABELS: return "labels must be given: the divergence or its weights single out the label";
        case FUSEDKD_BAD_WORKSPACE: return "workspace must be 8-byte aligned and hold fusedkd_rows_workspace() bytes";
        case FUSEDKD_NO_DRIVER: return "libcuda.so.1 cannot be loaded: this needs a machine with an NVIDIA driver";
        case FUSEDKD_NO_CONTEXT: return "no CUDA context is current: call cudaSetDevice or cuCtxSetCurrent first";
        case FUSEDKD_NO_KERNEL:
            return "no kernel was built for this device, dtype or divergence: see FUSEDKD_ARCHS, FUSEDKD_DTYPES and "
                   "FUSEDKD_DIVERGENCES of the build";
        case FUSEDKD_DRIVER_ERROR: return "the CUDA driver reported an error: fusedkd_driver_error() is its CUresult";
    }
    return "unknown status";
}

int fusedkd_driver_error(void) { return driver_error; }

static const struct fusedkd_divergence_spec *spec_of(fusedkd_divergence divergence) {
    return (int)divergence < 0 || (int)divergence >= fusedkd_spec_count ? NULL : &fusedkd_specs[divergence];
}

const char *fusedkd_divergence_name(fusedkd_divergence divergence) {
    const struct fusedkd_divergence_spec *spec = spec_of(divergence);
    return spec ? spec->name : NULL;
}

int fusedkd_parameter_count(fusedkd_divergence divergence) {
    const struct fusedkd_divergence_spec *spec = spec_of(divergence);
    return spec ? spec->parameter_count : -1;
}

const char *fusedkd_parameter_name(fusedkd_divergence divergence, int index) {
    const struct fusedkd_divergence_spec *spec = spec_of(divergence);
    return spec && index >= 0 && index < spec->parameter_count ? spec->parameters[index].name : NULL;
}

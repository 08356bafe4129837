/* Splits a difference by the classes of its elements, and joins it again. `splitting.py` does the same by numpy. The last
   functions tell how far floats moved and whether they are finite, as `registry/transfer` does by numpy and by torch.

   An element is a float of 2 or 4 bytes, read as a whole number without a sign. Its class is the number of limits that
   are not above the exponent of the old element: the byte behind the sign. Every function releases the interpreter
   lock, and another thread or process may change the memory meanwhile. So a place that was computed from the memory is
   compared with the length where it is used, and not only before. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { EXPONENTS = 256, MOST_CLASSES = 256, BATCH = 256, NEIGHBOURS = 4 };

typedef struct {
    Py_ssize_t count;
    uint8_t of[EXPONENTS];
} Classes;

static int classes_of(const Py_buffer *limits, Classes *classes)
{
    const uint8_t *bytes = limits->buf;
    if (limits->len >= MOST_CLASSES) {
        PyErr_SetString(PyExc_ValueError, "there are too many classes");
        return -1;
    }
    classes->count = limits->len + 1;
    for (int exponent = 0; exponent < EXPONENTS; exponent++) {
        int class = 0;
        for (Py_ssize_t i = 0; i < limits->len; i++)
            class += bytes[i] <= exponent;
        classes->of[exponent] = (uint8_t)class;
    }
    return 0;
}

/* Memory may have any alignment, so elements are copied. Compilers make one instruction of it. */
static inline uint32_t element(const char *from, Py_ssize_t i, int size)
{
    uint16_t two;
    uint32_t four;
    if (size == 2) {
        memcpy(&two, from + 2 * i, 2);
        return two;
    }
    memcpy(&four, from + 4 * i, 4);
    return four;
}

static inline void set_element(char *to, Py_ssize_t i, uint32_t value, int size)
{
    uint16_t two = (uint16_t)value;
    if (size == 2)
        memcpy(to + 2 * i, &two, 2);
    else
        memcpy(to + 4 * i, &value, 4);
}

static inline int exponent_of(uint32_t element, int size)
{
    return (element >> (size == 2 ? 7 : 23)) & 0xff;
}

static inline int class_of(uint32_t old, const Classes *classes, int size)
{
    return classes->of[exponent_of(old, size)];
}

static inline int is_within(Py_ssize_t place, Py_ssize_t length)
{
    return (size_t)place < (size_t)length;
}

/* The loops are inlined twice, with a constant `size`. */

/* Elements side by side often have the same exponent, and the processor waits for a counter that it has just written. So
   neighbours have counters of their own. */
static inline void count_loop(
    const char *old, Py_ssize_t length, const Classes *classes, Py_ssize_t *counts, int size)
{
    Py_ssize_t seen[NEIGHBOURS][EXPONENTS] = {{0}};
    Py_ssize_t i = 0;
    for (; length - i >= NEIGHBOURS; i += NEIGHBOURS)
        for (int k = 0; k < NEIGHBOURS; k++)
            seen[k][exponent_of(element(old, i + k, size), size)]++;
    for (; i < length; i++)
        seen[0][exponent_of(element(old, i, size), size)]++;
    for (int exponent = 0; exponent < EXPONENTS; exponent++)
        for (int k = 0; k < NEIGHBOURS; k++)
            counts[classes->of[exponent]] += seen[k][exponent];
}

/* The places of a batch are computed before anything is written. Otherwise the processor waits at each element until it
   knows that the write before did not change `next`: splitting takes a third longer, and joining in place three times as
   long. */
static inline int split_batch(
    const char *new, const char *old, Py_ssize_t start, int count, Py_ssize_t length, const Classes *classes,
    Py_ssize_t *next, char *out, int size)
{
    Py_ssize_t places[BATCH];
    for (int i = 0; i < count; i++)
        places[i] = next[class_of(element(old, start + i, size), classes, size)]++;
    for (int i = 0; i < count; i++) {
        if (!is_within(places[i], length))
            return -1;
        set_element(out, places[i], element(new, start + i, size) - element(old, start + i, size), size);
    }
    return 0;
}

static inline int split_loop(
    const char *new, const char *old, Py_ssize_t length, const Classes *classes, Py_ssize_t *next, char *out, int size)
{
    Py_ssize_t start = 0;
    for (; length - start >= BATCH; start += BATCH)
        if (split_batch(new, old, start, BATCH, length, classes, next, out, size) < 0)
            return -1;
    return split_batch(new, old, start, (int)(length - start), length, classes, next, out, size);
}

static inline int join_batch(
    const char *old, Py_ssize_t start, int count, Py_ssize_t length, const Classes *classes, Py_ssize_t *next,
    const char *values, char *out, int size)
{
    Py_ssize_t places[BATCH];
    for (int i = 0; i < count; i++)
        places[i] = next[class_of(element(old, start + i, size), classes, size)]++;
    for (int i = 0; i < count; i++) {
        if (!is_within(places[i], length))
            return -1;
        set_element(out, start + i, element(old, start + i, size) + element(values, places[i], size), size);
    }
    return 0;
}

static inline int join_loop(
    const char *old, Py_ssize_t length, const Classes *classes, Py_ssize_t *next, const char *values, char *out, int size)
{
    Py_ssize_t start = 0;
    for (; length - start >= BATCH; start += BATCH)
        if (join_batch(old, start, BATCH, length, classes, next, values, out, size) < 0)
            return -1;
    return join_batch(old, start, (int)(length - start), length, classes, next, values, out, size);
}

static void count_classes(const Py_buffer *old, const Classes *classes, Py_ssize_t *counts)
{
    memset(counts, 0, MOST_CLASSES * sizeof *counts);
    if (old->itemsize == 2)
        count_loop(old->buf, old->len / 2, classes, counts, 2);
    else
        count_loop(old->buf, old->len / 4, classes, counts, 4);
}

/* Where each class begins. */
static void starts_of(const Py_ssize_t *counts, Py_ssize_t *starts)
{
    Py_ssize_t start = 0;
    for (int i = 0; i < MOST_CLASSES; i++) {
        starts[i] = start;
        start += counts[i];
    }
}

/* Whether each class ended where the next one began. */
static int is_complete(const Py_ssize_t *counts, const Py_ssize_t *next)
{
    Py_ssize_t end = 0;
    for (int i = 0; i < MOST_CLASSES; i++) {
        end += counts[i];
        if (next[i] != end)
            return 0;
    }
    return 1;
}

static PyObject *tuple_of(const Py_ssize_t *counts, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *number = PyLong_FromSsize_t(counts[i]);
        if (number == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, number);
    }
    return tuple;
}

/* Reads the counts of the classes, which together have at most `length` elements. */
static int counts_of(PyObject *tuple, const Classes *classes, Py_ssize_t length, Py_ssize_t *counts)
{
    Py_ssize_t left = length;
    memset(counts, 0, MOST_CLASSES * sizeof *counts);
    if (PyTuple_GET_SIZE(tuple) != classes->count) {
        PyErr_SetString(PyExc_ValueError, "there are counts of more or fewer classes");
        return -1;
    }
    for (Py_ssize_t i = 0; i < classes->count; i++) {
        counts[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, i));
        if (counts[i] == -1 && PyErr_Occurred())
            return -1;
        if (counts[i] < 0 || counts[i] > left) {
            PyErr_SetString(PyExc_ValueError, "the classes have more elements than there are");
            return -1;
        }
        left -= counts[i];
    }
    return 0;
}

static int first_elements_of(PyObject *object, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS) < 0)
        return -1;
    if (view->itemsize == 2 || view->itemsize == 4)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "elements have 2 or 4 bytes");
    return -1;
}

static int as_many_elements_of(PyObject *object, Py_buffer *view, const Py_buffer *like, int extra_flags)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | extra_flags) < 0)
        return -1;
    if (view->itemsize == like->itemsize && view->len == like->len)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "the parts of a difference have several lengths");
    return -1;
}

PyDoc_STRVAR(count_doc, "count(old, limits, /)\n--\n\nReturn how many elements each class has.");

static PyObject *count(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *old_object, *result = NULL;
    Py_buffer limits, old;
    Classes classes;
    Py_ssize_t counts[MOST_CLASSES];

    if (!PyArg_ParseTuple(arguments, "Oy*:count", &old_object, &limits))
        return NULL;
    if (classes_of(&limits, &classes) < 0 || first_elements_of(old_object, &old) < 0)
        goto release_limits;
    Py_BEGIN_ALLOW_THREADS
    count_classes(&old, &classes, counts);
    Py_END_ALLOW_THREADS
    result = tuple_of(counts, classes.count);
    PyBuffer_Release(&old);
release_limits:
    PyBuffer_Release(&limits);
    return result;
}

PyDoc_STRVAR(
    split_doc,
    "split(new, old, limits, out, /)\n--\n\n"
    "Write `new - old` into `out`, class after class, and return how many elements each has.");

static PyObject *split(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *new_object, *old_object, *out_object, *result = NULL;
    Py_buffer limits, old, new, out;
    Classes classes;
    Py_ssize_t counts[MOST_CLASSES], next[MOST_CLASSES];
    int failed;

    if (!PyArg_ParseTuple(arguments, "OOy*O:split", &new_object, &old_object, &limits, &out_object))
        return NULL;
    if (classes_of(&limits, &classes) < 0 || first_elements_of(old_object, &old) < 0)
        goto release_limits;
    if (as_many_elements_of(new_object, &new, &old, 0) < 0)
        goto release_old;
    if (as_many_elements_of(out_object, &out, &old, PyBUF_WRITABLE) < 0)
        goto release_new;
    Py_BEGIN_ALLOW_THREADS
    count_classes(&old, &classes, counts);
    starts_of(counts, next);
    if (old.itemsize == 2)
        failed = split_loop(new.buf, old.buf, old.len / 2, &classes, next, out.buf, 2);
    else
        failed = split_loop(new.buf, old.buf, old.len / 4, &classes, next, out.buf, 4);
    Py_END_ALLOW_THREADS
    if (failed || !is_complete(counts, next))
        PyErr_SetString(PyExc_ValueError, "the base of a difference changed while it was read");
    else
        result = tuple_of(counts, classes.count);
    PyBuffer_Release(&out);
release_new:
    PyBuffer_Release(&new);
release_old:
    PyBuffer_Release(&old);
release_limits:
    PyBuffer_Release(&limits);
    return result;
}

PyDoc_STRVAR(
    join_doc,
    "join(old, limits, counts, values, out, /)\n--\n\n"
    "Write `old` plus `values` into `out`; the values stand class after class. `out` may be the memory of `old`.");

static PyObject *join(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *old_object, *counts_object, *values_object, *out_object, *result = NULL;
    Py_buffer limits, old, values, out;
    Classes classes;
    Py_ssize_t counts[MOST_CLASSES], next[MOST_CLASSES];
    int failed;

    if (!PyArg_ParseTuple(
            arguments, "Oy*O!OO:join", &old_object, &limits, &PyTuple_Type, &counts_object, &values_object,
            &out_object))
        return NULL;
    if (classes_of(&limits, &classes) < 0 || first_elements_of(old_object, &old) < 0)
        goto release_limits;
    if (counts_of(counts_object, &classes, old.len / old.itemsize, counts) < 0)
        goto release_old;
    if (as_many_elements_of(values_object, &values, &old, 0) < 0)
        goto release_old;
    if (as_many_elements_of(out_object, &out, &old, PyBUF_WRITABLE) < 0)
        goto release_values;
    Py_BEGIN_ALLOW_THREADS
    starts_of(counts, next);
    if (old.itemsize == 2)
        failed = join_loop(old.buf, old.len / 2, &classes, next, values.buf, out.buf, 2);
    else
        failed = join_loop(old.buf, old.len / 4, &classes, next, values.buf, out.buf, 4);
    Py_END_ALLOW_THREADS
    if (failed || !is_complete(counts, next))
        PyErr_SetString(PyExc_ValueError, "a class has another number of elements than it should");
    else
        result = Py_NewRef(Py_None);
    PyBuffer_Release(&out);
release_values:
    PyBuffer_Release(&values);
release_old:
    PyBuffer_Release(&old);
release_limits:
    PyBuffer_Release(&limits);
    return result;
}

/* The loops over lanes become vector instructions. AVX2, where the processor has it, takes half the time of SSE2. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum { LANES = 16, SUMMED = 1024 };

typedef struct {
    double moved, before, cross;
    float largest;
    Py_ssize_t changed;
} Sums;

/* Sums of `SUMMED` elements are float32 in each lane, and those of all elements float64. Zeros follow the last element. */
FOR_EACH_PROCESSOR static void sum_up(const float *old, const float *new, Py_ssize_t length, Sums *sums)
{
    float last_old[SUMMED] = {0}, last_new[SUMMED] = {0}, largest[LANES] = {0};
    double all_steps[LANES] = {0}, all_squares[LANES] = {0}, all_products[LANES] = {0};
    for (Py_ssize_t left = length; left > 0; left -= SUMMED, old += SUMMED, new += SUMMED) {
        float steps[LANES] = {0}, squares[LANES] = {0}, products[LANES] = {0};
        int32_t changed[LANES] = {0};
        if (left < SUMMED) {
            old = memcpy(last_old, old, (size_t)left * 4);
            new = memcpy(last_new, new, (size_t)left * 4);
        }
        for (int i = 0; i < SUMMED; i += LANES)
            for (int k = 0; k < LANES; k++) {
                float before = old[i + k], step = new[i + k] - before, distance = fabsf(step);
                steps[k] += step * step;
                squares[k] += before * before;
                products[k] += before * step;
                largest[k] = largest[k] < distance ? distance : largest[k];
                changed[k] += step != 0;
            }
        for (int k = 0; k < LANES; k++) {
            all_steps[k] += steps[k];
            all_squares[k] += squares[k];
            all_products[k] += products[k];
            sums->changed += changed[k];
        }
    }
    for (int k = 0; k < LANES; k++) {
        sums->moved += all_steps[k];
        sums->before += all_squares[k];
        sums->cross += all_products[k];
        sums->largest = sums->largest < largest[k] ? largest[k] : sums->largest;
    }
}

PyDoc_STRVAR(
    sums_doc,
    "sums(old, new, /)\n--\n\n"
    "Return the sums of squares of `new - old` and of `old`, that of the products of both, the largest distance, and how\n"
    "many elements differ. Elements are float32.");

static PyObject *sums(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *old_object, *new_object, *result = NULL;
    Py_buffer old, new;
    Sums found = {0};

    if (!PyArg_ParseTuple(arguments, "OO:sums", &old_object, &new_object) || first_elements_of(old_object, &old) < 0)
        return NULL;
    if (as_many_elements_of(new_object, &new, &old, 0) < 0)
        goto release_old;
    if (old.itemsize == 4 && (uintptr_t)old.buf % 4 == 0 && (uintptr_t)new.buf % 4 == 0) {
        Py_BEGIN_ALLOW_THREADS
        sum_up(old.buf, new.buf, old.len / 4, &found);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue(
            "ddddn", found.moved, found.before, found.cross, (double)found.largest, found.changed);
    } else
        PyErr_SetString(PyExc_ValueError, "elements have 4 bytes, and begin at a multiple of that");
    PyBuffer_Release(&new);
release_old:
    PyBuffer_Release(&old);
    return result;
}

/* Whether an element has all bits of a mask. Each block is looked at without a branch. */
#define ANY_WITH(type) \
    for (Py_ssize_t start = 0; start < length; start += SUMMED) { \
        const type *block = (const type *)values + start; \
        Py_ssize_t count = length - start < SUMMED ? length - start : SUMMED; \
        type found = 0; \
        for (Py_ssize_t i = 0; i < count; i++) \
            found |= (block[i] & (type)mask) == (type)mask; \
        if (found) \
            return 1; \
    } \
    return 0;

FOR_EACH_PROCESSOR static int any_of_2_bytes(const void *values, Py_ssize_t length, uint32_t mask)
{
    ANY_WITH(uint16_t)
}

FOR_EACH_PROCESSOR static int any_of_4_bytes(const void *values, Py_ssize_t length, uint32_t mask)
{
    ANY_WITH(uint32_t)
}

PyDoc_STRVAR(
    any_with_doc,
    "any_with(values, mask, /)\n--\n\n"
    "Return whether an element has all bits of the mask. Elements have 2 or 4 bytes.");

static PyObject *any_with(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *object;
    Py_buffer values;
    unsigned int mask;
    int found;

    if (!PyArg_ParseTuple(arguments, "OI:any_with", &object, &mask) || first_elements_of(object, &values) < 0)
        return NULL;
    if ((uintptr_t)values.buf % (uintptr_t)values.itemsize != 0) {
        PyBuffer_Release(&values);
        PyErr_SetString(PyExc_ValueError, "elements begin at a multiple of their bytes");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    if (values.itemsize == 2)
        found = any_of_2_bytes(values.buf, values.len / 2, mask);
    else
        found = any_of_4_bytes(values.buf, values.len / 4, mask);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&values);
    return PyBool_FromLong(found);
}

static PyMethodDef methods[] = {
    {"any_with", any_with, METH_VARARGS, any_with_doc},
    {"count", count, METH_VARARGS, count_doc},
    {"split", split, METH_VARARGS, split_doc},
    {"join", join, METH_VARARGS, join_doc},
    {"sums", sums, METH_VARARGS, sums_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "registry.store._split",
    .m_doc = "Splits a difference by the classes of its elements, and joins it again.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__split(void)
{
    return PyModuleDef_Init(&definition);
}

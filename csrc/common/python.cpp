#include "python.h"

#include "tensor_list.h"

namespace cwclip {
namespace {

PyObject* py_rule(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 3, "rule(norm_type, eps, nonfinite)");
  const Order order = arguments.order();
  const double eps = arguments.real();
  const int64_t nonfinite = arguments.number();
  if (nonfinite < 0 || nonfinite > 2) arguments.fail(PyExc_ValueError, "nonfinite: expected 0, 1 or 2");
  if (arguments.failed()) return nullptr;
  return capsule_of(std::make_unique<ClipRule>(ClipRule{order, eps, static_cast<NonFinite>(nonfinite)}));
}

}  // namespace

PyMethodDef methods[] = {
    method("rule", &py_rule),
    method("signature_of", &py_signature_of),
    method("addresses_of", &py_addresses_of),
    method("gradients_of", &py_gradients_of),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace cwclip

// A CUDA device guard that does nothing, for builds of torch without CUDA. With it, FakeTensors that say they are on
// "cuda" can be copied, indexed and sent: nothing is computed, but the program takes the way it takes on a GPU.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}

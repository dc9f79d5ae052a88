// Makes a CPU build of torch report one GPU, which is enough for fake tensors on "cuda", because their kernels never run.
//
// torch needs two objects for a device: a guard, with which autograd switches devices and streams, and the hooks, which
// report whether CUDA is available. Both describe a single idle device and do nothing.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

const Device kOnlyDevice(c10::DeviceType::CUDA, 0);
const Stream kOnlyStream(Stream::DEFAULT, kOnlyDevice);

struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device getDevice() const override { return kOnlyDevice; }
  Device exchangeDevice(Device) const override { return kOnlyDevice; }
  Stream getStream(Device) const noexcept override { return kOnlyStream; }
  Stream getDefaultStream(Device) const override { return kOnlyStream; }
  Stream getNewStream(Device, int) const override { return kOnlyStream; }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

c10::impl::DeviceGuardImplRegistrar registered_guard(c10::DeviceType::CUDA, new IdleGuard());

}  // namespace

namespace at {

struct IdleHooks final : CUDAHooksInterface {
  explicit IdleHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", IdleHooks);

}  // namespace at

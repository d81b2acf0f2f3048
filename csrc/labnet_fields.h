// LAB-Net's problems from lists of whole numbers, as Python hands them over; the order here is that
// of kernels/labnet_layers.py.
#pragma once

#include <vector>

#include "labnet.h"

namespace tenfold {

class LabnetFields {
 public:
  explicit LabnetFields(const std::vector<long>& fields) : fields_(fields) {}

  LabnetLayer layer() {
    LabnetLayer layer{};
    layer.height = next();
    layer.width = next();
    layer.leaky = next() != 0;
    layer.threads = static_cast<int>(next());
    layer.source_count = next();
    layer.conv_count = next();
    layer.out = map();
    layer.add = map();
    layer.merge = weight();
    for (long i = 0; i < layer.source_count && i < kLabnetSources; ++i) layer.sources[i] = map();
    for (long i = 0; i < layer.conv_count && i < kLabnetConvs; ++i) layer.convs[i] = weight();
    return layer;
  }

  LabnetVariances variances() {
    return {map(), at<const float>(), at<double>(), at<float>(), next(), next(),
            static_cast<int>(next())};
  }

  LabnetResample resample() {
    return {map(), map(), at<const std::int32_t>(), at<const std::int32_t>(), next(), next(),
            static_cast<int>(next())};
  }

  LabnetPixels pixels() {
    return {map(), at<const std::int64_t>(), at<float>(), next(), next(), next() != 0,
            static_cast<int>(next())};
  }

 private:
  long next() { return fields_.at(used_++); }
  template <class T>
  T* at() {
    return reinterpret_cast<T*>(next());
  }
  // Braces are evaluated from left to right.
  LabnetMap map() { return {at<float>(), next(), next(), next(), next()}; }
  LabnetWeight weight() {
    return {at<const float>(), at<const float>(), at<const std::int32_t>(),
            at<const std::int32_t>(), next(), next(), next()};
  }

  const std::vector<long>& fields_;
  std::size_t used_ = 0;
};

}  // namespace tenfold

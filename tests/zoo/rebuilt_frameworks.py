# SPDX-License-Identifier: BSD-3-Clause
"""What TensorFlow's, Paddle's and Keras's ASPP compute, as ports to PyTorch have it; NVIDIA's and
IndexNet's."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case


class Conv2dSame(nn.Module):
    """deeplab2: convolution, norm and activation by name."""

    def __init__(self, cin, cout, k, rate=1, activation="relu"):
        super().__init__()
        self._conv = nn.Conv2d(cin, cout, k, padding="same", dilation=rate, bias=False)
        self._batch_norm = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.01)
        self._activation = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu, "elu": F.elu}[
            activation
        ]

    def forward(self, x):
        return self._activation(self._batch_norm(self._conv(x)))


class PoolPart(nn.Module):
    """Pools everything, or windows once a size is set."""

    def __init__(self, cin, cout, activation):
        super().__init__()
        self._pool_size = (None, None)
        self._conv_bn_act = Conv2dSame(cin, cout, 1, activation=activation)

    def set_pool_size(self, pool_size):
        self._pool_size = pool_size

    def forward(self, x):
        height, width = x.shape[2], x.shape[3]
        if self._pool_size[0] is None:
            pooled = x.mean(dim=(2, 3), keepdim=True)
        else:
            pooled = F.avg_pool2d(x, self._pool_size, stride=1)
        pooled = self._conv_bn_act(pooled)
        return F.interpolate(pooled, (height, width), mode="bilinear", align_corners=True)


class Deeplab2TF(nn.Module):
    def __init__(self, cin=16, cout=8, rates=(6, 12, 18), activation="relu", pool_size=None):
        super().__init__()
        self.conv0 = Conv2dSame(cin, cout, 1, activation=activation)
        self.conv1 = Conv2dSame(cin, cout, 3, rates[0], activation)
        self.conv2 = Conv2dSame(cin, cout, 3, rates[1], activation)
        self.conv3 = Conv2dSame(cin, cout, 3, rates[2], activation)
        self.pool = PoolPart(cin, cout, activation)
        if pool_size is not None:
            self.pool.set_pool_size(pool_size)
        self.proj_conv_bn_act = Conv2dSame(5 * cout, cout, 1, activation=activation)
        self.proj_drop = nn.Dropout(0.1)

    def forward(self, x):
        results = [self.conv0(x), self.conv1(x), self.conv2(x), self.conv3(x), self.pool(x)]
        x = self.proj_conv_bn_act(torch.cat(results, 1))
        return self.proj_drop(x)


class TensorFlowModels(nn.Module):
    """tensorflow/models: layers by scope names, pool first, norm and ReLU between."""

    def __init__(self, cin=16, depth=8, rates=(6, 12, 18), use_sepconv=True):
        super().__init__()
        self.rates, self.use_sepconv = rates, use_sepconv
        self._add("image_pooling", cin, depth)
        self._add("aspp0", cin, depth)
        for i, rate in enumerate(rates, 1):
            if use_sepconv:
                self._add(f"aspp{i}_depthwise", cin, cin, 3, rate, groups=cin)
                self._add(f"aspp{i}_pointwise", cin, depth)
            else:
                self._add(f"aspp{i}", cin, depth, 3, rate)
        self._add("concat_projection", (len(rates) + 2) * depth, depth)

    def _add(self, scope, cin, cout, k=1, rate=1, groups=1):
        padding = rate if k == 3 else 0
        conv = nn.Conv2d(cin, cout, k, padding=padding, dilation=rate, groups=groups, bias=False)
        self.add_module(scope, conv)
        self.add_module(f"{scope}_BatchNorm", nn.BatchNorm2d(cout, eps=1e-5, momentum=3e-4))

    def _run(self, scope, x):
        x = getattr(self, scope)(x)
        return torch.relu(getattr(self, f"{scope}_BatchNorm")(x))

    def forward(self, features):
        size = features.shape[2:]
        pooled = self._run("image_pooling", F.adaptive_avg_pool2d(features, 1))
        branch_logits = [F.interpolate(pooled, size, mode="bilinear", align_corners=True)]
        branch_logits.append(self._run("aspp0", features))
        for i in range(1, len(self.rates) + 1):
            if self.use_sepconv:
                y = self._run(f"aspp{i}_depthwise", features)
                y = self._run(f"aspp{i}_pointwise", y)
            else:
                y = self._run(f"aspp{i}", features)
            branch_logits.append(y)
        y = self._run("concat_projection", torch.cat(branch_logits, dim=1))
        return F.dropout(y, p=0.1, training=self.training)


class PaddleConvBN(nn.Module):
    relu = False

    def __init__(self, cin, cout, k, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        self._conv = nn.Conv2d(cin, cout, k, 1, padding, dilation, groups, bias)
        self._batch_norm = nn.SyncBatchNorm(cout)

    def forward(self, x):
        x = self._batch_norm(self._conv(x))
        return F.relu(x) if self.relu else x


class PaddleConvBNReLU(PaddleConvBN):
    relu = True


class PaddleSeparable(nn.Module):
    """A norm but no ReLU between; the key's spelling is PaddleSeg's."""

    def __init__(self, cin, cout, k, padding, dilation):
        super().__init__()
        self.depthwise_conv = PaddleConvBN(cin, cin, k, padding, dilation, groups=cin)
        self.piontwise_conv = PaddleConvBNReLU(cin, cout, 1)

    def forward(self, x):
        return self.piontwise_conv(self.depthwise_conv(x))


class PaddleASPP(nn.Module):
    """PaddleSeg: a rate of 1 is a 1x1 branch, biases before norms."""

    def __init__(
        self, aspp_ratios=(1, 6, 12, 18), cin=16, cout=8, use_sep_conv=False, image_pooling=True
    ):
        super().__init__()
        self.image_pooling = image_pooling
        self.aspp_blocks = nn.ModuleList()
        for ratio in aspp_ratios:
            conv = PaddleSeparable if use_sep_conv and ratio > 1 else PaddleConvBNReLU
            k, padding = (1, 0) if ratio == 1 else (3, ratio)
            self.aspp_blocks.append(conv(cin, cout, k, padding=padding, dilation=ratio))
        out_size = len(self.aspp_blocks)
        if image_pooling:
            self.global_avg_pool = nn.Sequential(
                nn.AdaptiveAvgPool2d(output_size=(1, 1)),
                PaddleConvBNReLU(cin, cout, 1, bias=False),
            )
            out_size += 1
        self.conv_bn_relu = PaddleConvBNReLU(cout * out_size, cout, 1)
        self.dropout = nn.Dropout(p=0.1)

    def forward(self, x):
        outputs = []
        for block in self.aspp_blocks:
            y = block(x)
            outputs.append(y)
        if self.image_pooling:
            img_avg = self.global_avg_pool(x)
            img_avg = F.interpolate(img_avg, x.shape[2:], mode="bilinear", align_corners=False)
            outputs.append(img_avg)
        x = torch.cat(outputs, dim=1)
        x = self.conv_bn_relu(x)
        return self.dropout(x)


class KerasPyramid(nn.Module):
    """keras-hub: Keras's norm settings, channels cast back to the input's dtype, no dropout."""

    def __init__(self, cin=16, num_channels=8, dilation_rates=(6, 12, 18), activation=nn.ReLU):
        super().__init__()

        def unit(cin, k, rate):
            return nn.Sequential(
                nn.Conv2d(cin, num_channels, k, padding="same", dilation=rate, bias=False),
                nn.BatchNorm2d(num_channels, eps=1e-3, momentum=0.01),
                activation(),
            )

        self.aspp_parallel_channels = nn.ModuleList([unit(cin, 1, 1)])
        self.aspp_parallel_channels.extend(unit(cin, 3, rate) for rate in dilation_rates)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), unit(cin, 1, 1))
        self.projection = unit((len(dilation_rates) + 2) * num_channels, 1, 1)
        self.dropout = nn.Dropout(0.0)

    def forward(self, inputs):
        result = []
        for channel in self.aspp_parallel_channels:
            result.append(channel(inputs).to(inputs.dtype))
        pooled = F.interpolate(self.pool(inputs), inputs.shape[2:], mode="bilinear")
        result.append(pooled.to(inputs.dtype))
        return self.dropout(self.projection(torch.cat(result, dim=1)))


class NvidiaASPP(nn.Module):
    """NVIDIA's semantic-segmentation: the concatenation grows branch by branch."""

    def __init__(self, in_dim=16, reduction_dim=8, output_stride=16, rates=(6, 12, 18)):
        super().__init__()
        if output_stride == 8:
            rates = [2 * r for r in rates]

        def unit(k, r):
            return nn.Sequential(
                nn.Conv2d(in_dim, reduction_dim, k, padding=r * (k // 2), dilation=r, bias=False),
                nn.BatchNorm2d(reduction_dim),
                nn.ReLU(inplace=True),
            )

        self.features = nn.ModuleList([unit(1, 1)] + [unit(3, r) for r in rates])
        self.img_pooling = nn.AdaptiveAvgPool2d(1)
        self.img_conv = unit(1, 1)

    def forward(self, x):
        x_size = x.size()
        img_features = self.img_conv(self.img_pooling(x))
        out = F.interpolate(img_features, size=x_size[2:], mode="bilinear", align_corners=True)
        for f in self.features:
            y = f(x)
            out = torch.cat((out, y), 1)
        return out


class DensePredictionCell(nn.Module):
    """NVIDIA's other module: b, c and d read a, which reads x; e reads b."""

    def __init__(self, in_dim=16, reduction_dim=8):
        super().__init__()

        def unit(cin, rate):
            k, padding = (1, 0) if rate == (1, 1) else (3, rate)
            return nn.Sequential(
                nn.Conv2d(cin, reduction_dim, k, padding=padding, dilation=rate, bias=False),
                nn.BatchNorm2d(reduction_dim),
                nn.ReLU(inplace=True),
            )

        self.a = unit(in_dim, (1, 6))
        self.b = unit(reduction_dim, (18, 15))
        self.c = unit(reduction_dim, (6, 3))
        self.d = unit(reduction_dim, (1, 1))
        self.e = unit(reduction_dim, (6, 21))

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(a)
        d = self.d(a)
        e = self.e(b)
        return torch.cat((a, b, c, d, e), 1)


class IndexUnit(nn.Module):
    def __init__(self, cin, cout, k, padding, dilation, separable=False):
        super().__init__()
        if separable:
            self.atrous_conv = nn.Sequential(
                nn.Conv2d(cin, cin, k, 1, padding, dilation, groups=cin, bias=False),
                nn.SyncBatchNorm(cin),
                nn.ReLU6(inplace=True),
                nn.Conv2d(cin, cout, 1, bias=False),
            )
        else:
            self.atrous_conv = nn.Conv2d(cin, cout, k, 1, padding, dilation, bias=False)
        self.bn = nn.SyncBatchNorm(cout)
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.atrous_conv(x)))


class IndexNetASPP(nn.Module):
    """IndexNet matting: ReLU6 in place, nearest upsampling of the pooled branch."""

    def __init__(self, inp=16, oup=8, output_stride=32, separable=True):
        super().__init__()
        rates = {32: (1, 2, 4, 8), 16: (1, 6, 12, 18), 8: (1, 12, 24, 36)}[output_stride]
        self.aspp1 = IndexUnit(inp, oup, 1, 0, rates[0])
        self.aspp2 = IndexUnit(inp, oup, 3, rates[1], rates[1], separable)
        self.aspp3 = IndexUnit(inp, oup, 3, rates[2], rates[2], separable)
        self.aspp4 = IndexUnit(inp, oup, 3, rates[3], rates[3], separable)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(inp, oup, 1, bias=False),
            nn.SyncBatchNorm(oup),
            nn.ReLU6(inplace=True),
        )
        self.bottleneck_conv = nn.Sequential(
            nn.Conv2d(oup * 5, oup, 1, bias=False), nn.SyncBatchNorm(oup), nn.ReLU6(inplace=True)
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x1, x2, x3, x4 = self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x)
        x5 = self.global_avg_pool(x)
        x5 = F.interpolate(x5, size=x4.size()[2:], mode="nearest")
        x = torch.cat((x1, x2, x3, x4, x5), dim=1)
        return self.dropout(self.bottleneck_conv(x))


FRAMEWORKS = {
    "deeplab2": Case(Deeplab2TF, ONE, 'padding="same", eps 1e-3', row=16),
    "deeplab2_swish": Case(lambda: Deeplab2TF(activation="swish"), ONE, "swish", row=16),
    "deeplab2_gelu": Case(lambda: Deeplab2TF(activation="gelu"), ONE, "GELU", row=16),
    "deeplab2_pool_window": Case(
        lambda: Deeplab2TF(activation="elu", pool_size=(11, 13)),
        ONE,
        "ELU; the pooled map is 3x3 and resized bilinearly",
        row=16,
    ),
    "tensorflow_models": Case(
        TensorFlowModels, ONE, "separable, norm and ReLU between; pool first", row=17
    ),
    "tensorflow_models_dense": Case(
        lambda: TensorFlowModels(use_sepconv=False), ONE, "layers found by getattr", row=17
    ),
    "paddleseg": Case(PaddleASPP, ONE, "biases before norms, none in the pooled branch", row=18),
    "paddleseg_separable": Case(
        lambda: PaddleASPP((1, 12, 24, 36), use_sep_conv=True, image_pooling=False),
        ONE,
        "separable with a norm between; no pooled branch",
        row=18,
    ),
    "keras_hub": Case(KerasPyramid, ONE, "casts to the input's dtype", row=19),
    "nvidia": Case(NvidiaASPP, ONE, "concatenations of concatenations; no projection", row=27),
    "nvidia_dpc": Case(
        DensePredictionCell, ONE, "rates per axis; three siblings read one's result", row=27
    ),
    "indexnet": Case(IndexNetASPP, ONE, "separable, norm and ReLU6 between; nearest", row=31),
    "indexnet_dense": Case(
        lambda: IndexNetASPP(output_stride=16, separable=False), ONE, "ReLU6; nearest", row=31
    ),
}

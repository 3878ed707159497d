"""The merging methods, by family. `METHODS` is the one list of them."""

from __future__ import annotations

from ..method import Method
from .adamerging import AdaMerging, Atlas
from .concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from .fisher import Fisher
from .linear import Average, Dni, ExPO, Linear, Lines, MetaGpt, Passthrough, TaskArithmetic, WiseFt
from .localized import LocalizeAndStitch, MagMax
from .masks import ConsensusTa, ConsensusTies, Emr, TallMasks
from .pcb import Pcb
from .regmean import RegMean
from .selective import ArceeFusion, NearSwap, Ram, RamPlus, Sce
from .sparse import Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, Della, DellaLinear
from .spectral.aligned import CoreSpace, Knots
from .spectral.calibrated import Svc
from .spectral.descent import Doge, Wudi
from .spectral.directions import Cart, IsoC, IsoCts, TsvM
from .spherical import Karcher, ModelStock, MultiSlerp, NuSlerp, Slerp
from .ties import Ties

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Linear,
        Average,
        WiseFt,
        Dni,
        ExPO,
        Lines,
        MetaGpt,
        Slerp,
        NuSlerp,
        MultiSlerp,
        Karcher,
        ModelStock,
        Passthrough,
        NearSwap,
        TaskArithmetic,
        Ties,
        DareLinear,
        DareTies,
        DellaLinear,
        Della,
        Breadcrumbs,
        BreadcrumbsTies,
        Sce,
        Ram,
        RamPlus,
        ArceeFusion,
        MagMax,
        LocalizeAndStitch,
        ConsensusTa,
        ConsensusTies,
        Pcb,
        TallMasks,
        Emr,
        TsvM,
        IsoC,
        IsoCts,
        Cart,
        Wudi,
        Doge,
        Svc,
        Knots,
        CoreSpace,
        Fisher,
        RegMean,
        AdaMerging,
        Atlas,
        ConcreteTaskArithmetic,
        ConcreteAdaMerging,
    )
}

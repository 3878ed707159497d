"""The merging methods, by family. `METHODS` is the one list of them."""

from __future__ import annotations

from ..method import Method
from .adamerging import AdaMerging
from .fisher import Fisher
from .linear import Average, Dni, ExPO, Linear, Lines, MetaGpt, TaskArithmetic, WiseFt
from .regmean import RegMean
from .sparse import Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, Della, DellaLinear
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
        TaskArithmetic,
        Ties,
        DareLinear,
        DareTies,
        DellaLinear,
        Della,
        Breadcrumbs,
        BreadcrumbsTies,
        Fisher,
        RegMean,
        AdaMerging,
    )
}

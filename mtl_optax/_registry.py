"""`METHODS`: one row a method, the single source of truth about it.

The test battery, the command line and the tables read it; nothing about a method is
written down anywhere else (but for its BibTeX, in `_citations`).
"""

import functools
from collections.abc import Callable

from mtl_optax import aggregators, weightings
from mtl_optax._arguments import check_num_tasks
from mtl_optax._method import Claim, Exemption, Kind, Method
from mtl_optax._other_batches import NEEDS_OTHER_BATCHES
from mtl_optax._transform import Combiner, sum_tasks
from mtl_optax.jacobian import look_ahead_jacobian, task_jacobian


def _row(
    factory: Callable[..., Combiner],
    *,
    name: str | None = None,
    summary: str,
    paper: str,
    length: str,
    peers: str = "",
    cost: str,
    state_size: str,
    claims: frozenset[Claim],
    needs: frozenset[str] = frozenset(),
    jacobian: Callable[..., Callable[..., object]] = task_jacobian,
    normalises: bool = False,
    exempt: tuple[Exemption, ...] = (),
) -> Method:
    weighting = factory(num_tasks=1).weighting
    kind: Kind = "aggregator" if weighting is None else "weighting"
    return Method(
        name=name or factory.__name__,
        factory=factory,
        kind=kind if jacobian is task_jacobian else "jacobian",
        summary=summary,
        paper=paper,
        length=length,
        peers=peers,
        needs=needs if weighting is None else needs | weighting.needs,
        cost=cost,
        state_size=state_size,
        claims=claims,
        jacobian=jacobian,
        normalises=normalises,
        exempt=exempt,
    )


def _sum_tasks(num_tasks: int) -> Combiner:
    """What follows a Jacobian; with T given, as for every method."""
    check_num_tasks(num_tasks)
    return sum_tasks(num_tasks)


# Of every method whose weights depend on nothing but the losses.
_BY_LOSSES_ALONE: frozenset[Claim] = frozenset(
    {"permutation_equivariant", "scale_equivariant", "linear_under_scaling"}
)

_ROWS = (
    _row(
        weightings.mean,
        summary="every task counts alike (the baseline)",
        paper="Kurin et al. 2022, arXiv:2201.04122",
        length="weights sum to 1",
        peers="TorchJD Mean",
        cost="1",
        state_size="0",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "linear_under_scaling"}
        ),
    ),
    _row(
        weightings.constant_weights,
        summary="fixed weights; ones: plain training on the sum",
        paper="Kurin et al. 2022, arXiv:2201.04122",
        length="the weights given",
        peers="TorchJD Constant, Sum; LibMTL EW",
        cost="1",
        state_size="0",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "linear_under_scaling"}
        ),
    ),
    _row(
        weightings.rlw,
        summary="random weights, anew at every step",
        paper="Lin et al. 2022, arXiv:2111.10603",
        length="weights sum to 1",
        peers="TorchJD Random; LibMTL RLW",
        cost="1",
        state_size="0",
        claims=frozenset({"scale_equivariant", "linear_under_scaling"}),
    ),
    _row(
        weightings.uncertainty_weighting,
        summary="losses divided by learned noise levels",
        paper="Kendall, Gal & Cipolla 2018, arXiv:1705.07115",
        length="weights learned, from 1/2",
        peers="TorchJD UW; LibMTL UW",
        cost="1",
        state_size="4 * T",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.imtl_l,
        summary="losses brought to one size by learned factors",
        paper="Liu et al. 2021, ICLR",
        length="weights learned, from 1",
        peers="TorchJD IMTLL; LibMTL IMTL",
        cost="1",
        state_size="4 * T",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.scale_invariant,
        summary="sum of the logarithms of the losses",
        paper="Navon et al. 2022, arXiv:2202.01017 (a baseline)",
        length="weights are 1 / loss",
        cost="1",
        state_size="0",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.gls,
        summary="geometric mean of the losses",
        paper="Chennupati et al. 2019, arXiv:1904.08492",
        length="weights are geometric mean / (T * loss)",
        peers="TorchJD GeometricMean; LibMTL GLS",
        cost="1",
        state_size="0",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.stch,
        summary="a smooth maximum of the losses",
        paper="Lin et al. 2024, arXiv:2402.19078",
        length="weights sum to 1 / T",
        peers="TorchJD STCH; LibMTL STCH",
        cost="1",
        state_size="0",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.cosmos,
        summary="weighted sum that holds losses to a ratio by their cosine",
        paper="Ruchte & Grabocka 2021, arXiv:2103.13392",
        length="longer, the smaller the losses",
        peers="TorchJD COSMOS",
        cost="1",
        state_size="0",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.pbi,
        summary="losses down a ray, and back to it",
        paper="Zhang & Li 2007, doi:10.1109/TEVC.2007.892759",
        length="weights of length sqrt(1 + theta^2)",
        peers="TorchJD PBI",
        cost="1",
        state_size="0",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.dwa,
        summary="more weight for losses that fell little over two windows",
        paper="Liu, Johns & Davison 2019, arXiv:1803.10704",
        length="weights sum to T",
        peers="TorchJD DWA; LibMTL DWA",
        cost="1",
        state_size="4 * T",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.softadapt,
        summary="more weight for losses that rise, or fall slowly",
        paper="Heydari, Thompson & Mehmood 2019, arXiv:1912.12355",
        length="weights sum to 1",
        cost="1",
        state_size="T * (window + 1)",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.relobralo,
        summary="losses' progress since the last step, smoothed (ReLoBRaLo)",
        paper="Bischof & Kraus 2021, arXiv:2110.09813",
        length="weights sum to T",
        cost="1",
        state_size="4 * T",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.famo,
        summary="all losses fall at one rate, learned from losses alone",
        paper="Liu, Feng, Stone & Liu 2023, arXiv:2306.03792",
        length="weights sum to 1",
        peers="TorchJD FAMO; LibMTL FAMO",
        cost="1",
        state_size="6 * T + 1",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.ldc_mtl,
        summary="neighbouring weighted losses kept alike by a penalty",
        paper="Xiao et al. 2025, arXiv:2502.08585",
        length="weights sum to about 1",
        cost="1",
        state_size="6 * T",
        claims=_BY_LOSSES_ALONE - {"permutation_equivariant"},
    ),
    _row(
        weightings.go4align,
        summary="inverse losses as weights, shared by groups of tasks",
        paper="Shen et al. 2024, arXiv:2404.06486",
        length="about a sum of T gradients",
        cost="1",
        state_size="T",
        claims=_BY_LOSSES_ALONE,
    ),
    _row(
        weightings.mgda,
        summary="shortest convex combination of the task gradients",
        paper="Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650",
        length="weights sum to 1",
        peers="TorchJD MGDA; LibMTL MGDA",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {
                "non_conflicting",
                "permutation_equivariant",
                "scale_equivariant",
                "stops_at_pareto_stationary",
            }
        ),
    ),
    _row(
        weightings.upgrad,
        summary="mean of the gradients, each projected to harm no task",
        paper="Quinton & Rey 2024, arXiv:2406.16232",
        length="mean of projections",
        peers="TorchJD UPGrad; LibMTL UPGrad",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {
                "non_conflicting",
                "permutation_equivariant",
                "scale_equivariant",
                "linear_under_scaling",
            }
        ),
    ),
    _row(
        weightings.dualproj,
        summary="mean gradient, projected to harm no task",
        paper="Lopez-Paz & Ranzato 2017, arXiv:1706.08840",
        length="projected mean",
        peers="TorchJD DualProj",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {"non_conflicting", "permutation_equivariant", "scale_equivariant"}
        ),
    ),
    _row(
        weightings.pcgrad,
        summary="gradients freed from conflicts one by one, summed",
        paper="Yu et al. 2020, arXiv:2001.06782",
        length="sum of projections",
        peers="TorchJD PCGrad; LibMTL PCGrad",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset({"scale_equivariant", "linear_under_scaling"}),
    ),
    _row(
        weightings.gradvac,
        summary="gradients turned to the pairs' usual cosines, summed",
        paper="Wang et al. 2021, arXiv:2010.05874",
        length="sum of turned gradients",
        peers="TorchJD GradVac; LibMTL GradVac",
        cost="Gramian + 1",
        state_size="T * T",
        claims=frozenset({"scale_equivariant", "linear_under_scaling"}),
    ),
    _row(
        weightings.cagrad,
        summary="near the mean, the best for the worst task",
        paper="Liu et al. 2021, arXiv:2110.14048",
        length="mean + c |mean|",
        peers="TorchJD CAGrad; LibMTL CAGrad",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
    ),
    _row(
        weightings.imgrad,
        summary="CAGrad that heeds how unbalanced gradients are",
        paper="Zhou et al. 2025, arXiv:2503.08006",
        length="mean + c |mean|",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
    ),
    _row(
        weightings.nash_mtl,
        summary="bargain: the product of the tasks' decreases is largest",
        paper="Navon et al. 2022, arXiv:2202.01017",
        length="at most max_norm",
        peers="TorchJD NashMTL; LibMTL Nash_MTL",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {"non_conflicting", "permutation_equivariant", "row_scale_invariant"}
        ),
    ),
    _row(
        weightings.fairgrad,
        summary="alpha-fair share of progress",
        paper="Ban & Ji 2024, arXiv:2402.15638",
        length="sqrt(T) at alpha = 1",
        peers="TorchJD FairGrad; LibMTL FairGrad",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {"non_conflicting", "permutation_equivariant", "row_scale_invariant"}
        ),
    ),
    _row(
        weightings.pivrg,
        summary="FairGrad that favours tasks behind their baselines",
        paper="Qin et al. 2025, CVPR",
        length="shorter, the longer gradients",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset({"non_conflicting", "permutation_equivariant"}),
        needs=frozenset({"delta_m"}),
    ),
    _row(
        weightings.imtl_g,
        summary="equal projections on all task directions",
        paper="Liu et al. 2021, ICLR",
        length="weights sum to 1 or -1",
        peers="TorchJD IMTLG; LibMTL IMTL",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "row_scale_invariant"}
        ),
    ),
    _row(
        weightings.imtl,
        summary="equal projections on all directions, of losses of one size",
        paper="Liu et al. 2021, ICLR",
        length="as imtl_g of the scaled losses",
        peers="LibMTL IMTL",
        cost="Gramian + 1",
        state_size="4 * T",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "row_scale_invariant"}
        ),
    ),
    _row(
        weightings.config,
        summary="equal projections on all directions, as long as they agree",
        paper="Liu, Chu & Thuerey 2025, arXiv:2408.11104",
        length="sum of the gradients, projected",
        peers="TorchJD ConFIG",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "linear_under_scaling"}
        ),
    ),
    _row(
        weightings.gradnorm,
        summary="weights learned so that gradients are alike, longer for slow tasks",
        paper="Chen et al. 2018, arXiv:1711.02257",
        length="weights sum to T",
        peers="LibMTL GradNorm",
        cost="Gramian + 1",
        state_size="6 * T",
        claims=frozenset({"permutation_equivariant"}),
    ),
    _row(
        weightings.aligned_mtl,
        summary="gradients made orthogonal and alike, averaged",
        paper="Senushkin et al. 2023, arXiv:2305.19000",
        length="shortest principal component",
        peers="TorchJD AlignedMTL; LibMTL Aligned_MTL",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
    ),
    _row(
        weightings.ntkmtl_sr,
        summary="all gradients at their root mean square length (NTKMTL)",
        paper="Qin et al. 2025, arXiv:2510.18258",
        length="sum of T gradients",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "row_scale_invariant"}
        ),
    ),
    _row(
        weightings.pcd,
        summary="the first task, as far as it does not harm the others",
        paper="Varam & AlHajri 2026, arXiv:2606.29521",
        length="as the first gradient",
        peers="TorchJD PCD",
        cost="Gramian + 1",
        state_size="2 * T",
        claims=frozenset(),
    ),
    _row(
        weightings.krum,
        summary="the gradients closest to their neighbours",
        paper="Blanchard et al. 2017, arXiv:1703.02757",
        length="weights sum to 1",
        peers="TorchJD Krum",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset({"scale_equivariant"}),
    ),
    _row(
        weightings.edm,
        summary="equal angles with the task gradients (central direction)",
        paper="Katrutsa et al. 2020, arXiv:2007.06937",
        length="weights sum to 1",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {
                "non_conflicting",
                "permutation_equivariant",
                "scale_equivariant",
                "row_scale_invariant",
            }
        ),
    ),
    _row(
        weightings.task_tensioner,
        summary="central direction, moved by each task's convergence behaviour",
        paper="Nakamura, Grassi & Wolf 2022, arXiv:2204.06698",
        length="about the central direction",
        cost="Gramian + 1",
        state_size="T * (window + 4)",
        claims=frozenset(),
    ),
    _row(
        aggregators.priority_projection,
        summary="a channel's gradient may not hurt the task that leans on it most",
        paper="Jeong & Yoon 2024, arXiv:2406.02996",
        length="sum of projections",
        cost="T",
        state_size="0",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "linear_under_scaling"}
        ),
        needs=frozenset({"strengths"}),
        exempt=(Exemption(9, "it looks at every entry of every row"),),
    ),
    _row(
        aggregators.scale_by_mao,
        summary="sum of every task's own Adam step (MAO)",
        paper="Hervella et al. 2024, doi:10.1016/j.neunet.2023.11.038",
        length="sum of T Adam steps",
        cost="T",
        state_size="2 * T * parameters",
        claims=frozenset({"permutation_equivariant"}),
        normalises=True,
        exempt=(
            Exemption(4, "one task alone is trained by Adam"),
            Exemption(9, "it looks at every entry of every row"),
        ),
    ),
    _row(
        aggregators.graddrop,
        summary="gradients of a sign that is drawn, entry by entry",
        paper="Chen et al. 2020, arXiv:2010.06808",
        length="sum of the gradients of one sign",
        peers="TorchJD GradDrop; LibMTL GradDrop",
        cost="T",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
        needs=frozenset({"key"}),
        exempt=(
            Exemption(9, "it looks at every entry of every row"),
            Exemption(10, "under shard_map a device draws for its own part"),
        ),
    ),
    _row(
        aggregators.trimmed_mean,
        summary="mean without the most extreme numbers, entry by entry",
        paper="Yin et al. 2018, arXiv:1803.01498",
        length="mean",
        peers="TorchJD TrimmedMean",
        cost="T",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
        exempt=(Exemption(9, "it looks at every entry of every row"),),
    ),
    _row(
        aggregators.excess_mtl,
        summary="more weight for tasks farther from their own optimum",
        paper="He et al. 2024, arXiv:2402.02009",
        length="weights sum to T",
        peers="TorchJD ExcessMTL; LibMTL ExcessMTL",
        cost="T",
        state_size="T * parameters",
        claims=frozenset({"permutation_equivariant"}),
        exempt=(Exemption(9, "it looks at every entry of every row"),),
    ),
    _row(
        aggregators.moco,
        summary="shortest combination of gradients tracked over time",
        paper="Fernando et al. 2023, arXiv:2210.12624",
        length="weights sum to 1",
        peers="LibMTL MoCo",
        cost="T",
        state_size="T * parameters",
        claims=frozenset({"permutation_equivariant"}),
        exempt=(
            Exemption(4, "one task alone is trained with momentum"),
            Exemption(9, "it looks at every entry of every row"),
        ),
    ),
    _row(
        aggregators.db_mtl,
        summary="all directions of smoothed log-loss gradients, at one length",
        paper="Lin et al. 2023, arXiv:2308.12029",
        length="T times the longest",
        peers="LibMTL DB_MTL",
        cost="T",
        state_size="T * parameters",
        claims=frozenset(
            {"permutation_equivariant", "scale_equivariant", "row_scale_invariant"}
        ),
        needs=frozenset({"losses"}),
        exempt=(
            Exemption(4, "one task alone is trained with momentum"),
            Exemption(9, "it looks at every entry of every row"),
        ),
    ),
    _row(
        aggregators.m_config,
        summary="equal projections on all momenta, then Adam's step size",
        paper="Liu, Chu & Thuerey 2025, arXiv:2408.11104",
        length="an Adam step",
        cost="T",
        state_size="(T + 2) * parameters",
        claims=frozenset({"permutation_equivariant"}),
        normalises=True,
        exempt=(
            Exemption(4, "one task alone is trained by Adam"),
            Exemption(9, "it looks at every entry of every row"),
        ),
    ),
    _row(
        aggregators.modo,
        summary="shortest combination, its weights learned on other batches",
        paper="Chen et al. 2023, arXiv:2305.20057",
        length="weights sum to 1",
        peers="TorchJD MoDoWeighting; LibMTL MoDo",
        cost="3 * T",
        state_size="T",
        claims=frozenset({"permutation_equivariant"}),
        needs=NEEDS_OTHER_BATCHES,
        exempt=(Exemption(9, "it looks at every entry of every row"),),
    ),
    _row(
        aggregators.sdmgrad,
        summary="near the mean, the shortest combination, on other batches",
        paper="Xiao, Ban & Ji 2023, arXiv:2305.18409",
        length="weights sum to 1",
        peers="TorchJD SDMGradWeighting; LibMTL SDMGrad",
        cost="3 * T",
        state_size="T",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
        needs=NEEDS_OTHER_BATCHES,
        exempt=(Exemption(9, "it looks at every entry of every row"),),
    ),
    _row(
        _sum_tasks,
        summary="gradients at each task's own point one step ahead, summed",
        paper="Lee & Son 2020, arXiv:2005.09910 (after the abstract)",
        length="sum of T gradients",
        cost="about 4 T",
        state_size="0",
        claims=frozenset({"permutation_equivariant"}),
        name="look_ahead_jacobian",
        jacobian=functools.partial(look_ahead_jacobian, inner_learning_rate=0.01),
        exempt=(
            Exemption(4, "one task alone looks ahead too"),
            Exemption(9, "each task has a graph of its own, at its own point"),
        ),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}

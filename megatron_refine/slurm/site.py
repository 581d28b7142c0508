"""The site file: what differs from cluster to cluster, in YAML."""

from pydantic import Field

from megatron_refine.config import Section
from megatron_refine.config.paths import ProgramText


class Site(Section):
    """A site. Every key may be left out."""

    account: str = Field("", description="sbatch --account")
    partition: str = Field("", description="sbatch --partition")
    qos: str = Field("", description="sbatch --qos")
    time: str = Field("24:00:00", pattern=r"^[0-9:-]+$", description="wall-clock limit of a job, sbatch --time")
    gpus_per_node: int = Field(8, ge=0, description="GPUs of a node, a rank each; 0: nodes without any")
    cpus_per_rank: int = Field(0, ge=0, description="sbatch --cpus-per-task; 0: the cluster's default")
    signal_seconds: int = Field(
        300, ge=1, description="seconds before its end at which a job is told to save; a step and a save must fit in"
    )
    retries: int = Field(3, ge=0, description="most restarts in a row after failures without a new checkpoint")
    python: ProgramText = Field(
        "", description="interpreter on the nodes, relative to the project's folder; empty: the one that submits"
    )
    modules: list[str] = Field(default_factory=list, description="module load ...")
    container: str = Field("", description="image for srun --container-image (pyxis)")
    mounts: list[str] = Field(default_factory=list, description="for srun --container-mounts")
    prefix: list[str] = Field(
        default_factory=list, description="words before the interpreter of every rank: [apptainer, exec, --nv, IMAGE]"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables of every rank")
    prologue: str = Field("", description="bash lines before the run, on the first node")
    sbatch: list[str] = Field(default_factory=list, description="further options of sbatch, with their --")
    srun: list[str] = Field(default_factory=list, description="further options of every srun")
    cpu_ranks: int = Field(2, ge=1, description="ranks of a node without GPUs")

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.cpu_ranks

    @property
    def in_image(self) -> bool:
        """Whether ranks find other programs than the login node has."""
        return bool(self.container or self.prefix)

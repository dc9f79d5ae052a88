"""`python -m fairseq_sparsemixer` is the command `fairseq-sparsemixer`."""

from fairseq_sparsemixer.cli import main

raise SystemExit(main())

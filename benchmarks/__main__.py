from benchmarks.table import main

raise SystemExit(main())

"""Networks of different initialisation on scikit-learn's handwritten digits: averaged, matched, merged."""

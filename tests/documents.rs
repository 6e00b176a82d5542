//! What is written about the programs is what they say themselves.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-ploop");

fn repo_file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("the program can be started");
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout).expect("it prints UTF-8")
}

/// The options in a `--help`, each with its default, if it has one.
fn options_in_help(help: &str) -> BTreeMap<String, Option<String>> {
    let mut options = BTreeMap::new();
    let mut current = None;
    let listed = help
        .lines()
        .skip_while(|line| *line != "Options:")
        .skip(1)
        // The examples follow.
        .take_while(|line| line.is_empty() || line.starts_with(' '));
    for line in listed.map(str::trim) {
        if line.starts_with('-') {
            let name = line
                .split([' ', ','])
                .find(|word| word.starts_with("--"))
                .map(|word| word.trim_end_matches("...").to_owned());
            current.clone_from(&name);
            options.extend(name.map(|name| (name, None)));
        } else if let Some((_, default)) = line.split_once("[default: ")
            && let Some(name) = &current
        {
            let default = default.trim_end_matches(']').to_owned();
            options.insert(name.clone(), Some(default));
        }
    }
    options
}

/// The options in the README's table, each with its default, if it has one.
fn options_in_readme(readme: &str) -> BTreeMap<String, Option<String>> {
    readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `--"))
        // A \| is part of the text.
        .map(|line| line.replace("\\|", "/"))
        .map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let option = cells.next().unwrap_or_default();
            let name = option.trim_end_matches('`').split(' ').next();
            let default = cells.next().filter(|cell| !cell.is_empty());
            (
                format!("--{}", name.unwrap_or_default()),
                default.map(str::to_owned),
            )
        })
        .collect()
}

#[test]
fn the_readme_has_the_options_of_the_daemon() {
    let mut help = options_in_help(&output(DAEMON, &["--help"]));
    help.remove("--help");
    help.remove("--version");
    let readme = options_in_readme(&repo_file("README.md"));
    assert!(!help.is_empty());
    assert_eq!(
        help.keys().collect::<Vec<_>>(),
        readme.keys().collect::<Vec<_>>()
    );
    for (name, default) in help {
        // Where the help needs a sentence, the README may find other words.
        if let Some(default) = default.filter(|default| !default.contains(' ')) {
            assert_eq!(readme[&name].as_ref(), Some(&default), "{name}");
        }
    }
}

#[test]
fn the_readme_has_the_commands_of_ploop_img() {
    let help = output(env!("CARGO_BIN_EXE_ploop-img"), &["--help"]);
    let commands: BTreeSet<_> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    let readme = repo_file("README.md");
    let (_, section) = readme
        .split_once("\n## ploop-img\n")
        .expect("it has a section");
    let section = section.split("\n## ").next().unwrap_or_default();
    let listed = section
        .lines()
        .filter_map(|line| line.strip_prefix("    ploop-img "));
    let listed: BTreeSet<_> = listed
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(!commands.is_empty());
    assert_eq!(commands, listed);
}

#[test]
fn the_description_for_libvirt_fits_the_capabilities() {
    let description: serde_json::Value =
        serde_json::from_str(&repo_file("qemu/50-vhost-user-ploop.json")).expect("it is JSON");
    // Whatever else is asked for.
    let capabilities = output(DAEMON, &["--nonsense", "--print-capabilities"]);
    let capabilities: serde_json::Value =
        serde_json::from_str(&capabilities).expect("the capabilities are JSON");
    assert_eq!(description["type"], capabilities["type"]);
    let binary = Path::new(description["binary"].as_str().expect("it has a binary"));
    assert!(binary.is_absolute());
    assert_eq!(binary.file_name(), Path::new(DAEMON).file_name());
}

#[test]
fn the_domain_for_libvirt_is_xml() {
    let domain = repo_file("qemu/libvirt-disk.xml");
    let mut reader = quick_xml::Reader::from_str(&domain);
    reader.config_mut().check_comments = true;
    loop {
        match reader.read_event() {
            Ok(quick_xml::events::Event::Eof) => break,
            Ok(_) => {}
            Err(error) => panic!("{error} at {}", reader.error_position()),
        }
    }
}

/// The crates of others that a manifest names, whatever for.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut is_list = false;
    let mut crates = BTreeSet::new();
    for line in manifest.lines() {
        if let Some(section) = line.strip_prefix('[') {
            is_list = section.ends_with("dependencies]");
        } else if is_list
            && let Some((name, value)) = line.split_once(" = ")
            && !value.contains("path = ")
        {
            crates.insert(name.to_owned());
        }
    }
    crates
}

#[test]
fn each_dependency_has_its_reason_and_no_other_has_one() {
    let manifests = [
        "Cargo.toml",
        "bench/Cargo.toml",
        "ci/mutants/Cargo.toml",
        "fuzz/Cargo.toml",
    ];
    let used = manifests.map(|manifest| dependencies(&repo_file(manifest)));
    let used: BTreeSet<String> = used.into_iter().flatten().collect();
    let document = repo_file("docs/dependencies.md");
    let explained: BTreeSet<String> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| "))
        .filter_map(|line| line.split('|').next())
        .flat_map(|cell| cell.split(','))
        .map(|name| name.trim().to_owned())
        .filter(|name| name != "crate")
        .collect();
    assert!(used.len() > 20, "{used:?}");
    assert_eq!(used, explained);
}

/// The names of the functions in all sources under this folder.
fn functions_under(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions_under(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let declared = text.split("fn ").skip(1);
            names.extend(declared.filter_map(|text| text.split(['(', '<']).next().map(Into::into)));
        }
    }
}

#[test]
fn the_tests_that_the_documentation_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut functions = BTreeSet::new();
    functions_under(&root.join("src"), &mut functions);
    functions_under(&root.join("tests"), &mut functions);
    for document in ["docs/series.md", "docs/durability.md"] {
        let text = repo_file(document);
        // Every other piece is in backticks. Of what is in them, sentences are tests.
        let quoted = text.split('`').skip(1).step_by(2);
        let named: Vec<_> = quoted
            .filter(|name| name.matches('_').count() >= 2)
            .filter(|name| name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()))
            .filter(|name| name.chars().any(|c| c.is_ascii_lowercase()))
            .collect();
        assert!(named.len() > 5, "{document} names {named:?}");
        for name in named {
            let is_kernels = name.starts_with("io_ring_");
            let is_there = is_kernels || functions.contains(name);
            assert!(is_there, "{document} names {name}, which is not there");
        }
    }
}

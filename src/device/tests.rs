use super::*;

#[test]
fn serial_numbers_have_up_to_20_visible_characters() {
    let full = "12345678901234567890";
    assert_eq!(full.parse::<Serial>().unwrap().as_bytes(), full.as_bytes());
    let short: Serial = "disk 1".parse().unwrap();
    assert_eq!(short.as_bytes(), b"disk 1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(
        "123456789012345678901".parse::<Serial>(),
        Err(SerialError::TooLong(21))
    );
    assert_eq!("a\nb".parse::<Serial>(), Err(SerialError::NotVisible('\n')));
    assert_eq!("ä".parse::<Serial>(), Err(SerialError::NotVisible('ä')));
}

#[test]
fn a_serial_number_from_a_name_leaves_out_what_it_cannot_have() {
    let serial = Serial::from_file_name("große Platte with a long name");
    assert_eq!(serial.as_bytes(), b"groePlattewithalongn");
}

#[test]
fn queues_are_limited() {
    assert!(Queues::new(1, 4).is_ok());
    assert!(Queues::new(MAX_QUEUES, MAX_QUEUE_SIZE).is_ok());
    assert_eq!(Queues::new(0, 128), Err(QueuesError::Number(0)));
    assert_eq!(Queues::new(65, 128), Err(QueuesError::Number(65)));
    for size in [0, 1, 2, 3, 100, 2048] {
        assert_eq!(Queues::new(1, size), Err(QueuesError::Size(size)));
    }
}
